"""What is asked of a framework while it is timed: requests by workload name, the same for both sides.

Prompts are random ids of the model's own vocabulary, so that no two share a prefix by accident and
every run of the same seed asks the same. Workloads whose prompts share a prefix are further builders
in :data:`WORKLOADS`; nothing else needs to know them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmir.errors import LlmirError


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how many tokens to generate for it, end-of-text or not."""

    prompt_token_ids: list[int]
    max_tokens: int


#: Makes the requests of one run out of a random source and the ids to draw from.
RequestBuilder = Callable[[random.Random, Sequence[int]], list[Request]]


@dataclass(frozen=True)
class Workload:
    """A named set of requests, all submitted at once."""

    name: str
    description: str
    repeats: int
    """Timed runs in one process, each with prompts of its own unless they are meant to be in the prefix cache."""
    build: RequestBuilder
    prefix_cached: bool = False
    """Whether the requests are served once, untimed, before: all but their last token is then in the prefix cache,
    as far as the framework caches. The timed runs serve those same requests again."""

    def requests(self, vocabulary: Sequence[int], seed: int, repeat: int) -> list[Request]:
        """The requests of timed run ``repeat``: the same for equal arguments, in every process."""
        drawn = 0 if self.prefix_cached else repeat
        return self.build(random.Random(f"{seed}/{self.name}/{drawn}"), vocabulary)

    def longest(self) -> int:
        """Tokens of the longest request, prompt and output."""
        return max(len(r.prompt_token_ids) + r.max_tokens for r in self.requests(range(1), seed=0, repeat=0))


def equal_requests(count: int, prompt_tokens: int, output_tokens: int) -> RequestBuilder:
    """``count`` requests of one shape."""
    return ragged_requests([(prompt_tokens, output_tokens)] * count)


def ragged_requests(shapes: Sequence[tuple[int, int]]) -> RequestBuilder:
    """One request for each (prompt tokens, output tokens)."""

    def build(source: random.Random, vocabulary: Sequence[int]) -> list[Request]:
        return [Request(source.choices(vocabulary, k=prompt), output) for prompt, output in shapes]

    return build


#: Prompts from a one-line question to a long document, in an order that puts short beside long. Outputs
#: are long enough that the first request ends after the last one has begun.
_MIXED_SHAPES = [(prompt, output) for output in (64, 96) for prompt in (2048, 64, 1024, 192, 3072, 96, 512, 384)]

WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("short", "16 requests, 128 tokens in, 64 out", 2, equal_requests(16, 128, 64)),
        Workload("chat", "16 requests, 1024 tokens in, 128 out", 1, equal_requests(16, 1024, 128)),
        Workload("long", "16 requests, 3072 tokens in, 64 out", 1, equal_requests(16, 3072, 64)),
        Workload("mixed", "16 requests, 64 to 3072 tokens in, 64 or 96 out", 1, ragged_requests(_MIXED_SHAPES)),
        Workload(
            "extend",
            "16 requests, 1023 tokens in the prefix cache and 1 new in, 1 out",
            2,
            equal_requests(16, 1024, 1),
            prefix_cached=True,
        ),
        Workload("brief", "16 requests, 1024 tokens in, 16 out", 1, equal_requests(16, 1024, 16)),
        Workload(
            "smoke", "2 requests, 48 tokens in, 8 out: shows that all works, no speed", 1, equal_requests(2, 48, 8)
        ),
    )
}


def workload_named(name: str) -> Workload:
    """The workload of that name; :class:`LlmirError` with the known names if there is none."""
    if name not in WORKLOADS:
        raise LlmirError(f"there is no workload {name!r}; choose from {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
