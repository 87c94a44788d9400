"""What is asked of a framework while it is timed: requests by workload name, the same for both sides.

Prompts are random ids of the model's own vocabulary: what two of them share they share because the workload says so,
and every run of the same seed asks the same. Two workloads are not drawn here: the frameworks' own generators of shared
prefixes make their requests, each in its own framework, as referees that llmir did not choose.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmir.compare.measuring import Tokens
from llmir.errors import LlmirError


@dataclass(frozen=True)
class Request:
    """What one client asks: a prompt (token ids), how many tokens to generate for it, end-of-text or not, and more."""

    prompt_token_ids: list[int]
    max_tokens: int
    cached_tokens: int = 0
    """Leading tokens of the prompt that are served once, untimed, before: as far as the framework caches, they are then
    in its prefix cache."""
    later_messages: tuple[list[int], ...] = ()
    """What the client says after each answer but the last."""

    def next_turn(self, answer: Sequence[int]) -> Request:
        """The request that follows: all that was said, the answer too, and the next message."""
        message, *rest = self.later_messages
        return Request([*self.prompt_token_ids, *answer, *message], self.max_tokens, later_messages=tuple(rest))

    def all_tokens(self) -> int:
        """Tokens of the prompt, all messages and all answers."""
        said = len(self.prompt_token_ids) + sum(map(len, self.later_messages))
        return said + self.max_tokens * (1 + len(self.later_messages))


#: Makes the requests of one run out of a random source and the ids to draw from.
RequestBuilder = Callable[[random.Random, Sequence[int]], list[Request]]


@dataclass(frozen=True)
class GeneratedPrefixes:
    """What a framework's own generator of shared prefixes is asked for; lengths in tokens."""

    framework: str
    """The one whose generator it is."""
    groups: int
    """Prefixes, each shared by ``requests`` requests."""
    requests: int
    prefix_tokens: int
    own_tokens: int
    output_tokens: int

    def all_tokens(self) -> int:
        """Tokens of a request, as asked for: a generator that makes text may miss them by a few."""
        return self.prefix_tokens + self.own_tokens + self.output_tokens


@dataclass(frozen=True)
class Workload:
    """A named set of requests, all submitted at once; in a conversation a turn begins when all answers are there."""

    name: str
    description: str
    repeats: int
    """Timed runs in one process, each with prompts of its own."""
    build: RequestBuilder | GeneratedPrefixes

    @property
    def framework(self) -> str | None:
        """The only framework that can serve it, because it makes the requests; None: all can."""
        return self.build.framework if isinstance(self.build, GeneratedPrefixes) else None

    def requests(self, vocabulary: Sequence[int], seed: int, repeat: int) -> list[Request]:
        """The requests of timed run ``repeat``: the same for equal arguments, in every process.

        Raises :class:`LlmirError` where a framework makes them.
        """
        if isinstance(self.build, GeneratedPrefixes):
            raise LlmirError(f"the requests of workload {self.name} are made by {self.build.framework}'s own generator")
        return self.build(random.Random(f"{seed}/{self.name}/{repeat}"), vocabulary)

    def longest(self) -> int:
        """Tokens of the longest request, all that is said and generated."""
        if isinstance(self.build, GeneratedPrefixes):
            return self.build.all_tokens()
        return max(request.all_tokens() for request in self.requests(range(1), seed=0, repeat=0))

    def tokens(self) -> Tokens:
        """What one run computes, prefixes that it caches before included."""
        if isinstance(self.build, GeneratedPrefixes):
            of_prompt = self.build.requests * self.build.own_tokens + self.build.prefix_tokens
            outputs = self.build.requests * self.build.output_tokens
            return Tokens(self.build.groups * of_prompt, self.build.groups * outputs)
        # Many ids: prefixes that differ must not look the same.
        requests = self.requests(range(1 << 16), seed=0, repeat=0)
        before = sum(len(prefix.prompt_token_ids) for prefix in prefixes_before(requests))
        prompts = sum(
            len(request.prompt_token_ids) - request.cached_tokens + sum(map(len, request.later_messages))
            for request in requests
        )
        return Tokens(before + prompts, sum(r.max_tokens * (1 + len(r.later_messages)) for r in requests))


def prefixes_before(requests: Sequence[Request]) -> list[Request]:
    """What is served, untimed, before ``requests``: each prefix that is to be in the cache, once, for one token."""
    prefixes = (tuple(request.prompt_token_ids[: request.cached_tokens]) for request in requests)
    return [Request(list(prefix), 1) for prefix in dict.fromkeys(prefixes) if prefix]


def equal_requests(count: int, prompt_tokens: int, output_tokens: int, cached_tokens: int = 0) -> RequestBuilder:
    """``count`` requests of one shape."""
    return branching_requests([(count, prompt_tokens)], output_tokens, cached_tokens)


def ragged_requests(shapes: Sequence[tuple[int, int]]) -> RequestBuilder:
    """One request for each (prompt tokens, output tokens)."""

    def build(source: random.Random, vocabulary: Sequence[int]) -> list[Request]:
        return [Request(source.choices(vocabulary, k=prompt), output) for prompt, output in shapes]

    return build


def branching_requests(levels: Sequence[tuple[int, int]], output_tokens: int, cached_tokens: int = 0) -> RequestBuilder:
    """A request for each way through a tree, in any order: what they have in common, they share.

    A level is (branches below each branch of the level above, prompt tokens of each).
    """

    def build(source: random.Random, vocabulary: Sequence[int]) -> list[Request]:
        prompts: list[list[int]] = [[]]
        for branches, tokens in levels:
            prompts = [prompt + source.choices(vocabulary, k=tokens) for prompt in prompts for _ in range(branches)]
        source.shuffle(prompts)
        return [Request(prompt, output_tokens, cached_tokens) for prompt in prompts]

    return build


def conversations(
    count: int, turns: int, system_tokens: int, message_tokens: int, answer_tokens: int
) -> RequestBuilder:
    """``count`` conversations of ``turns`` messages and answers each, after one system prompt, which is cached."""

    def build(source: random.Random, vocabulary: Sequence[int]) -> list[Request]:
        system = source.choices(vocabulary, k=system_tokens)
        said = [[source.choices(vocabulary, k=message_tokens) for _ in range(turns)] for _ in range(count)]
        return [Request(system + first, answer_tokens, system_tokens, tuple(later)) for first, *later in said]

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
            equal_requests(16, 1024, 1, cached_tokens=1024),
        ),
        # Where a prefix is cached before, as a server has it after its first requests, the run shows what is paid again
        # and again: own tokens and answers. A rollout's prompts are new in every step of training, so they are not.
        Workload(
            "shared-prefix",
            "16 requests, 6144 tokens shared by all (cached before), 128 own in, 32 out",
            1,
            branching_requests([(1, 6144), (16, 128)], 32, cached_tokens=6144),
        ),
        Workload(
            "groups",
            "32 requests, 2048 tokens shared by 8 (cached before), 128 own in, 32 out",
            1,
            branching_requests([(4, 2048), (8, 128)], 32, cached_tokens=2048),
        ),
        Workload(
            "tree",
            "16 requests, 2048 tokens shared by all and 2048 by 4 (cached before), 128 own in, 32 out",
            1,
            branching_requests([(1, 2048), (4, 2048), (4, 128)], 32, cached_tokens=4096),
        ),
        Workload(
            "rollout",
            "64 requests, 8 for the same prompt of 2048 tokens, 32 out",
            1,
            branching_requests([(8, 2048), (8, 0)], 32),
        ),
        Workload(
            "multi-turn",
            "16 conversations, 2048 tokens shared by all (cached before), 3 turns of 128 in, 32 out",
            1,
            conversations(16, 3, 2048, 128, 32),
        ),
        Workload(
            "prefix_repetition",
            "vLLM's own generator; 32 requests, 2048 tokens shared by 8, 128 own in, 32 out",
            1,
            GeneratedPrefixes("vllm", groups=4, requests=8, prefix_tokens=2048, own_tokens=128, output_tokens=32),
        ),
        Workload(
            "generated-shared-prefix",
            "SGLang's own; 32 requests, 2048 tokens shared by 8, 128 own in, 32 out",
            1,
            GeneratedPrefixes("sglang", groups=4, requests=8, prefix_tokens=2048, own_tokens=128, output_tokens=32),
        ),
        # What `llmir compare` chooses a dtype by (llmir/compare/dtype.py).
        Workload("eighth", "16 requests, 128 tokens in, 16 out: an eighth of chat", 1, equal_requests(16, 128, 16)),
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
