"""What a comparison asks of a running framework; one module beside this one for each framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Continuation
from llmir.compare.workloads import GeneratedPrefixes, Request


class Engine(Protocol):
    """A framework, loaded with a model and ready to serve."""

    def vocabulary(self) -> list[int]:
        """The ids of ordinary tokens: all but the special ones."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    def generate_requests(self, shape: GeneratedPrefixes, seed: int) -> list[Request]:
        """Requests of the framework's own generator of shared prefixes, as its own benchmark makes them."""

    def serve(self, requests: Sequence[Request]) -> list[RequestRecord]:
        """Submit all requests at once, generate greedily past any end-of-text, note when each token arrives."""

    def continue_greedily(self, prompts: Sequence[list[int]], output_tokens: int) -> list[Continuation]:
        """Generate for all prompts at once, with log-probabilities."""

    def score(self, texts: Sequence[list[int]]) -> list[list[float]]:
        """Log-probability of every token of each text but its first."""

    def forget_prefixes(self) -> None:
        """Empty the prefix cache."""

    def settings(self) -> dict[str, Any]:
        """The settings in force, as JSON values."""
