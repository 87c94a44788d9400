"""The requests a plan is made for: how long they are, how many run together, what they share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmir.errors import LlmirError

#: Requests decoded together where a workload does not say: the batch of the named workloads.
DEFAULT_CONCURRENCY = 16


class WorkloadError(LlmirError):
    """A workload is neither a known name nor a readable file of requests."""


@dataclass(frozen=True)
class Request:
    """One request, in tokens."""

    prompt_tokens: int
    output_tokens: int
    shared_tokens: int = 0
    """Leading prompt tokens that other requests of the workload have too."""

    def __post_init__(self) -> None:
        for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("shared_tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise WorkloadError(f"{name} of a request must be a whole number of at least {least}, not {value!r}")
        if self.shared_tokens > self.prompt_tokens:
            raise WorkloadError(
                f"a request cannot share {self.shared_tokens} tokens of a prompt of {self.prompt_tokens}"
            )


@dataclass(frozen=True)
class Workload:
    """Requests by their lengths, ``concurrency`` of them in flight at a time."""

    name: str
    requests: tuple[Request, ...]
    concurrency: int
    source: str
    """Where the lengths come from, for a reader."""

    def __post_init__(self) -> None:
        if not self.requests:
            raise WorkloadError(f"workload {self.name!r} has no requests; give it at least one")
        if type(self.concurrency) is not int or self.concurrency < 1:
            raise WorkloadError(f"concurrency must be a whole number of at least 1, not {self.concurrency!r}")

    @property
    def decode_steps(self) -> int:
        """Decode steps of all requests together, each one token of one request."""
        return sum(request.output_tokens for request in self.requests)

    @property
    def mean_output_tokens(self) -> float:
        """Mean decode steps of a request."""
        return self.decode_steps / len(self.requests)

    def mean_decode_tokens(self, window: int = 0) -> float:
        """Tokens of KV cache that a decode step of one request reads, on average; at most ``window`` unless 0."""
        total = 0
        for request in self.requests:
            first, last = request.prompt_tokens + 1, request.prompt_tokens + request.output_tokens
            total += _sum_to(last, window) - _sum_to(first - 1, window)
        return total / self.decode_steps

    def mean_prefill_keys(self, window: int = 0) -> float:
        """Keys that a request's prompt attends to, summed over its tokens; averaged over all requests.

        Shared tokens are left out: a prefix cache holds their keys after the first request.
        """
        pairs = sum(
            _sum_to(request.prompt_tokens, window) - _sum_to(request.shared_tokens, window) for request in self.requests
        )
        return pairs / len(self.requests)

    def mean_padding_tokens(self, block_size: int) -> float:
        """Slots of a request's last block that hold no token, averaged over all decode steps."""
        total = 0
        for request in self.requests:
            last = request.prompt_tokens + request.output_tokens
            total += _padding_to(last, block_size) - _padding_to(request.prompt_tokens, block_size)
        return total / self.decode_steps

    def mean_recomputed_tokens(self, block_size: int) -> float:
        """Tokens a request of a shared prefix computes again because a prefix cache holds whole blocks alone.

        The expected remainder of a prefix length, (block_size - 1) / 2, and never more than the prefix; averaged
        over all requests.
        """
        expected = (block_size - 1) / 2
        return sum(min(request.shared_tokens, expected) for request in self.requests) / len(self.requests)

    def summary(self) -> dict[str, Any]:
        """What a reader of a plan wants to know of the workload: its name, source, and mean lengths in tokens."""
        count = len(self.requests)
        return {
            "name": self.name,
            "source": self.source,
            "concurrency": self.concurrency,
            "requests": count,
            "mean_prompt_tokens": sum(request.prompt_tokens for request in self.requests) / count,
            "mean_output_tokens": self.mean_output_tokens,
            "mean_shared_tokens": sum(request.shared_tokens for request in self.requests) / count,
            "longest_tokens": max(request.prompt_tokens + request.output_tokens for request in self.requests),
        }

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values; :meth:`from_json` reads it, and so does :meth:`load` from a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any, name: str = "unnamed", source: str = "a file") -> Workload:
        """A workload from a list of requests, or a dictionary of ``requests`` and any of name, concurrency, source.

        A request is a dictionary with prompt_tokens, output_tokens and, if it shares a prefix, shared_tokens.
        Raises WorkloadError on other data.
        """
        facts: dict[str, Any] = {"requests": data} if isinstance(data, list) else data
        if not isinstance(facts, dict) or not isinstance(facts.get("requests"), list | tuple):
            raise WorkloadError(f"workload {name!r} has no list of requests; see `Workload.from_json` for the form")
        unknown = set(facts) - {"name", "requests", "concurrency", "source"}
        if unknown:
            raise WorkloadError(f"workload {name!r} has unknown fields {sorted(unknown)}")
        requests = tuple(_request(entry, position) for position, entry in enumerate(facts["requests"]))
        return cls(
            str(facts.get("name", name)),
            requests,
            facts.get("concurrency", max(1, min(DEFAULT_CONCURRENCY, len(requests)))),
            str(facts.get("source", source)),
        )

    @classmethod
    def load(cls, name: str | None = None) -> Workload:
        """The workload called ``name``, one from a file of that path, or the default for None.

        A file is JSON as :meth:`from_json` takes it, or JSON lines with one request a line (a trace).
        Raises WorkloadError where it is neither.
        """
        if name is None:
            return DEFAULT
        if name in NAMED:
            return NAMED[name]
        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise WorkloadError(
                f"no workload {name!r}: it is none of {', '.join(NAMED)}, and no readable file ({_why(error)})"
            ) from error
        return cls.from_json(_json_or_lines(text, name), path.stem, str(path))


def _request(entry: Any, position: int) -> Request:
    """A request out of its JSON dictionary."""
    try:
        return Request(**entry)
    except TypeError as error:
        raise WorkloadError(
            f"request {position} needs prompt_tokens, output_tokens and at most shared_tokens, not {entry!r}"
        ) from error
    except WorkloadError as error:
        raise WorkloadError(f"request {position}: {error}") from error


def _json_or_lines(text: str, name: str) -> Any:
    """The JSON value of a file, or the list of its lines' values; a single line is one value."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as whole:
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except json.JSONDecodeError:
            raise WorkloadError(f"the workload file {name!r} is not JSON: {whole}") from whole


def _why(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _sum_to(last: int, window: int) -> int:
    """Sum of min(length, window) over lengths 1 to ``last``; window 0: no limit."""
    if not window or last <= window:
        return last * (last + 1) // 2
    return window * (window + 1) // 2 + (last - window) * window


def _padding_to(last: int, block_size: int) -> int:
    """Sum over lengths 1 to ``last`` of the free slots in the last block."""
    blocks, rest = divmod(last, block_size)
    return blocks * block_size * (block_size - 1) // 2 + rest * block_size - rest * (rest + 1) // 2


def _named(name: str, shapes: list[tuple[int, int]], source: str) -> Workload:
    requests = tuple(Request(prompt, output) for prompt, output in shapes)
    return Workload(name, requests, DEFAULT_CONCURRENCY, source)


#: From a one-line question to a long document; ``llmir compare`` runs the same shapes.
_MIXED = [(prompt, output) for output in (64, 96) for prompt in (2048, 64, 1024, 192, 3072, 96, 512, 384)]

#: The workloads that ``llmir compare`` runs, as length distributions.
NAMED: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        _named("short", [(128, 64)] * 16, "16 requests, 128 tokens in, 64 out"),
        _named("chat", [(1024, 128)] * 16, "16 requests, 1024 tokens in, 128 out"),
        _named("long", [(3072, 64)] * 16, "16 requests, 3072 tokens in, 64 out"),
        _named("mixed", _MIXED, "16 requests, 64 to 3072 tokens in, 64 or 96 out"),
    )
}

#: Where nothing is known of the requests: all the named ones, and ``chat`` once more as later turns of a
#: conversation, since frameworks keep a prefix cache because requests do share prefixes.
DEFAULT = Workload(
    "default",
    tuple(request for workload in NAMED.values() for request in workload.requests)
    + tuple(replace(request, shared_tokens=request.prompt_tokens // 2) for request in NAMED["chat"].requests),
    DEFAULT_CONCURRENCY,
    f"{', '.join(NAMED)}, and chat with half of each prompt shared: nothing is known of the requests",
)
