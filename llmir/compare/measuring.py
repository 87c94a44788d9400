"""From the moments tokens arrived to the figures of a serving run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from llmir.errors import LlmirError


@dataclass(frozen=True)
class RequestRecord:
    """One request of a timed run; times are seconds on one monotonic clock."""

    prompt_tokens: int
    submitted: float
    token_times: list[float]
    """When each output token reached the client."""
    cached_tokens: int
    """Prompt tokens taken from the prefix cache."""
    token_ids: list[int] = field(default_factory=list)
    """What was generated."""
    turn: int = 0
    """Of a conversation: how many answers came before."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> RequestRecord:
        """The inverse of :meth:`to_json`."""
        return cls(**data)


@dataclass(frozen=True)
class Tokens:
    """Work: tokens to prefill and tokens to generate."""

    prompt: int
    output: int


@dataclass(frozen=True)
class Pace:
    """How fast a side works, in seconds a token; good for expecting how long it will take, not for a report."""

    prompt: float = 0.0
    output: float = 0.0

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Pace:
        """The pace of one timed run: of its prompts until each request has its first token, of the rest since then."""
        started, last = min(r.submitted for r in records), max(r.token_times[-1] for r in records)
        decoding = max(r.token_times[0] for r in records)
        prompt = sum(r.prompt_tokens - r.cached_tokens for r in records)
        output = sum(time > decoding for r in records for time in r.token_times)
        return cls((decoding - started) / max(1, prompt), (last - decoding) / output if output else 0.0)

    def slower(self, other: Pace) -> Pace:
        """The slower of two, each kind of token by itself."""
        return Pace(max(self.prompt, other.prompt), max(self.output, other.output))

    def seconds(self, tokens: Tokens) -> float:
        """How long so many tokens take."""
        return self.prompt * tokens.prompt + self.output * tokens.output


@dataclass(frozen=True)
class Metric:
    """A figure of a run, and whether less or more of it is better."""

    name: str
    unit: str
    lower_is_better: bool

    def speedup(self, baseline: float, llmir: float) -> float:
        """How many times better llmir is; above 1 is better whichever way the metric points."""
        return baseline / llmir if self.lower_is_better else llmir / baseline


METRICS: tuple[Metric, ...] = (
    Metric("time_per_output_token", "seconds", lower_is_better=True),
    Metric("time_to_first_token", "seconds", lower_is_better=True),
    Metric("output_tokens_per_second", "tokens per second", lower_is_better=False),
    Metric("total_tokens_per_second", "tokens per second", lower_is_better=False),
)


def figures(records: Sequence[RequestRecord]) -> dict[str, float]:
    """The metrics of :data:`METRICS` over one timed run, by name; rates are over the whole run.

    Where every request asks for a single token there is no decode, and so no time per output token. Raises
    :class:`LlmirError` if a request got no token or a run with decode has no steady part.
    """
    if any(not record.token_times for record in records):
        raise LlmirError("a request of the timed run got no output token, so the run cannot be measured")
    seconds = max(r.token_times[-1] for r in records) - min(r.submitted for r in records)
    output_tokens = sum(len(r.token_times) for r in records)
    prompt_tokens = sum(r.prompt_tokens for r in records)
    decode = any(len(r.token_times) > 1 for r in records)
    return {
        **({"time_per_output_token": steady_time_per_output_token(records)} if decode else {}),
        "time_to_first_token": median(r.token_times[0] - r.submitted for r in records),
        "output_tokens_per_second": output_tokens / seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / seconds,
    }


def steady_time_per_output_token(records: Sequence[RequestRecord]) -> float:
    """Seconds per output token of a request while all requests decode and none prefills.

    The window opens when the last request gets its first token and closes when the first request
    finishes; a request's share of the window over the tokens it got in it, averaged over requests.
    Each turn of conversations has a window of its own.
    """
    seconds, tokens = 0.0, 0
    for turn in {record.turn for record in records}:
        requests = [record for record in records if record.turn == turn]
        opens = max(record.token_times[0] for record in requests)
        closes = min(record.token_times[-1] for record in requests)
        arrived = sum(opens < time <= closes for record in requests for time in record.token_times)
        if closes <= opens or arrived == 0:
            raise LlmirError(
                "the run has no steady decode: the first request finished before the last one had its first token;"
                " use a workload with more output tokens or fewer requests"
            )
        seconds += (closes - opens) * len(requests)
        tokens += arrived
    return seconds / tokens


def median_figures(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """The median of each metric that the timed runs have."""
    return {name: median(run[name] for run in runs) for name in runs[0]}
