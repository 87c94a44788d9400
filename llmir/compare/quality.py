"""Are the answers the same? Greedy text, log-probabilities and perplexity of both sides, on English.

Greedy text is a noisy judge: one rounding decides between two near-equal tokens and everything after
differs. So its agreement stands beside the framework's agreement with itself, cold against
prefix-cached, and the log-probabilities are compared on contexts both sides share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llmir.compare.measuring import Tokens
from llmir.errors import LlmirError


@dataclass(frozen=True)
class QualityTask:
    """What each side is asked, cut from one English text."""

    prompts: int = 32
    prompt_tokens: int = 320
    """More than two blocks, so that the second, prefix-cached run reads blocks of the first."""
    output_tokens: int = 64
    windows: int = 16
    """Pieces of text whose perplexity is taken, each on its own."""
    window_tokens: int = 1024

    def longest(self) -> int:
        """Tokens of the longest request; scoring a window generates one token more."""
        return max(self.prompt_tokens + self.output_tokens, self.window_tokens + 1)

    def tokens(self) -> Tokens:
        """What is computed: the prompts and windows once, the continuations twice."""
        return Tokens(
            self.prompts * self.prompt_tokens + self.windows * self.window_tokens, 2 * self.prompts * self.output_tokens
        )


#: For whoever has little time: half of everything.
BRIEF_TASK = QualityTask(prompts=16, windows=8)


@dataclass(frozen=True)
class Continuation:
    """What a side generated greedily for one prompt."""

    token_ids: list[int]
    logprobs: list[dict[int, float]]
    """For each token, the log-probabilities of the most likely tokens at its place, itself among them."""
    cached_tokens: int
    """Prompt tokens taken from the prefix cache."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Continuation:
        """The inverse of :meth:`to_json` (JSON makes strings of the token ids)."""
        logprobs = [{int(token): value for token, value in place.items()} for place in data["logprobs"]]
        return cls(data["token_ids"], logprobs, data["cached_tokens"])


@dataclass(frozen=True)
class Answers:
    """Everything one side answered to a :class:`QualityTask`."""

    cold: list[Continuation]
    """With an empty prefix cache."""
    cached: list[Continuation]
    """The same prompts again, their blocks in the prefix cache."""
    text_logprobs: list[list[float]]
    """Log-probability of each token of each window but its first, given those before it."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Answers:
        """The inverse of :meth:`to_json`."""
        cold, cached = ([Continuation.from_json(c) for c in data[name]] for name in ("cold", "cached"))
        return cls(cold, cached, data["text_logprobs"])


@dataclass(frozen=True)
class Quality:
    """One framework's line in the report."""

    framework: str
    greedy_agreement: float
    """Share of prompts for which both sides generate the same tokens from first to last."""
    greedy_agreement_baseline_with_itself: float
    """The same share between the framework's cold and its prefix-cached run."""
    greedy_agreement_llmir_with_itself: float
    max_logprob_difference: float
    """Natural logarithms, decoding in the contexts both sides share; see :func:`logprob_differences`."""
    mean_logprob_difference: float
    max_logprob_difference_baseline_with_itself: float
    mean_logprob_difference_baseline_with_itself: float
    perplexity_baseline: float
    perplexity_llmir: float
    perplexity_relative_difference: float
    """|llmir - baseline| / baseline."""
    prompts: int
    cached_tokens: float
    """Tokens a prompt of the framework's prefix-cached run took from the cache, on average."""
    text_tokens: int


def english_text() -> str:
    """About 460 kB of English that every Python carries: its own reference manual."""
    from pydoc_data.topics import topics  # half a megabyte that only a comparison needs

    return "\n\n".join(topics[name] for name in sorted(topics))


def pieces(token_ids: Sequence[int], count: int, length: int) -> list[list[int]]:
    """``count`` pieces of ``length`` tokens, spread evenly over a text, none overlapping."""
    if count * length > len(token_ids):
        raise LlmirError(f"the quality text has {len(token_ids)} tokens, too few for {count} pieces of {length}")
    stride = len(token_ids) // count
    return [list(token_ids[i * stride : i * stride + length]) for i in range(count)]


def perplexity(windows: Sequence[Sequence[float]]) -> float:
    """exp of minus the mean log-probability over all tokens of all windows."""
    logprobs = [value for window in windows for value in window]
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def agreement(one: Sequence[Continuation], other: Sequence[Continuation]) -> float:
    """Share of prompts, 0 to 1, with the same tokens from first to last."""
    return sum(a.token_ids == b.token_ids for a, b in zip(one, other, strict=True)) / len(one)


def logprob_differences(one: Sequence[Continuation], other: Sequence[Continuation]) -> list[float]:
    """Absolute differences of the log-probability of ``one``'s tokens, wherever the context is the same.

    That is up to and with the first place where the two chose differently: up to there both sides have
    decoded the same continuation. Left out is such a last place only if the token is not among the most
    likely ones that ``other`` recorded.
    """
    return [difference for a, b in zip(one, other, strict=True) for difference in _shared_context(a, b)]


def _shared_context(one: Continuation, other: Continuation) -> Iterator[float]:
    places = zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False)
    for token, other_token, logprobs, other_logprobs in places:
        if token in other_logprobs:
            yield abs(logprobs[token] - other_logprobs[token])
        if token != other_token:
            return


def judge(framework: str, baseline: Answers, llmir: Answers) -> Quality:
    """Set both sides' answers to the same task against each other."""
    between = logprob_differences(baseline.cold, llmir.cold)
    within = logprob_differences(baseline.cold, baseline.cached)
    perplexities = perplexity(baseline.text_logprobs), perplexity(llmir.text_logprobs)
    return Quality(
        framework=framework,
        greedy_agreement=agreement(baseline.cold, llmir.cold),
        greedy_agreement_baseline_with_itself=agreement(baseline.cold, baseline.cached),
        greedy_agreement_llmir_with_itself=agreement(llmir.cold, llmir.cached),
        max_logprob_difference=max(between),
        mean_logprob_difference=math.fsum(between) / len(between),
        max_logprob_difference_baseline_with_itself=max(within),
        mean_logprob_difference_baseline_with_itself=math.fsum(within) / len(within),
        perplexity_baseline=perplexities[0],
        perplexity_llmir=perplexities[1],
        perplexity_relative_difference=abs(perplexities[1] - perplexities[0]) / perplexities[0],
        prompts=len(baseline.cold),
        cached_tokens=sum(c.cached_tokens for c in baseline.cached) / len(baseline.cached),
        text_tokens=sum(len(window) for window in baseline.text_logprobs),
    )
