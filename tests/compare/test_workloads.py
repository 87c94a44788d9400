from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from llmir.compare.measuring import Tokens
from llmir.compare.workloads import WORKLOADS, Request, prefixes_before, workload_named
from llmir.errors import LlmirError

VOCABULARY = range(100, 40000)
DRAWN = [name for name, workload in WORKLOADS.items() if workload.framework is None]


def drawn(name: str, seed: int = 0, repeat: int = 0) -> list[Request]:
    return workload_named(name).requests(VOCABULARY, seed, repeat)


def sharers(requests: Sequence[Request], tokens: int) -> list[int]:
    """How many requests have each beginning of ``tokens`` tokens, most first."""
    counts = Counter(tuple(request.prompt_token_ids[:tokens]) for request in requests)
    return sorted(counts.values(), reverse=True)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("short", (16, 128, 64)), ("chat", (16, 1024, 128)), ("long", (16, 3072, 64)), ("extend", (16, 1024, 1))],
)
def test_named_workloads_have_their_shapes(name: str, shape: tuple[int, int, int]):
    requests = workload_named(name).requests(VOCABULARY, seed=0, repeat=0)
    count, prompt, output = shape
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in requests] == [(prompt, output)] * count


def test_mixed_is_ragged():
    requests = workload_named("mixed").requests(VOCABULARY, seed=0, repeat=0)
    assert len({len(r.prompt_token_ids) for r in requests}) > 4


@pytest.mark.parametrize(
    ("name", "shape", "levels"),
    [
        ("shared-prefix", (16, 6144 + 128, 32), [(6144, [16]), (6145, [1] * 16)]),
        ("groups", (32, 2048 + 128, 32), [(1, [8] * 4), (2048, [8] * 4), (2049, [1] * 32)]),
        ("tree", (16, 4096 + 128, 32), [(2048, [16]), (2049, [4] * 4), (4096, [4] * 4), (4097, [1] * 16)]),
        ("rollout", (64, 2048, 32), [(1, [8] * 8), (2048, [8] * 8)]),
        ("multi-turn", (16, 2048 + 128, 32), [(2048, [16]), (2049, [1] * 16)]),
    ],
)
def test_prompts_share_what_the_workload_says_and_no_more(
    name: str, shape: tuple[int, int, int], levels: list[tuple[int, list[int]]]
):
    requests = drawn(name)
    count, prompt, output = shape
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in requests] == [(prompt, output)] * count
    for tokens, expected in levels:
        assert sharers(requests, tokens) == expected


def test_groups_arrive_mixed():
    firsts = [request.prompt_token_ids[0] for request in drawn("groups")]
    assert sum(one != other for one, other in pairwise(firsts)) > 8


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("extend", [1024] * 16),
        ("shared-prefix", [6144]),
        ("groups", [2048] * 4),
        ("tree", [4096] * 4),
        ("multi-turn", [2048]),
        ("rollout", []),
        ("chat", []),
    ],
)
def test_each_prefix_that_is_to_be_cached_is_served_once_for_one_token(name: str, lengths: list[int]):
    requests = drawn(name)
    before = prefixes_before(requests)
    assert [(len(r.prompt_token_ids), r.max_tokens) for r in before] == [(length, 1) for length in lengths]
    for request in requests:
        cached = request.prompt_token_ids[: request.cached_tokens]
        assert not cached or cached in [prefix.prompt_token_ids for prefix in before]


def test_a_turn_holds_all_that_was_said_before():
    first = drawn("multi-turn")[0]
    second = first.next_turn([1, 2, 3])
    third = second.next_turn([4, 5])
    said = [*first.prompt_token_ids, 1, 2, 3, *first.later_messages[0], 4, 5, *first.later_messages[1]]
    assert third.prompt_token_ids == said
    assert (third.max_tokens, third.later_messages, third.cached_tokens) == (32, (), 0)


def test_conversations_differ_in_every_message():
    messages = [tuple(message) for request in drawn("multi-turn") for message in request.later_messages]
    assert len(set(messages)) == len(messages) == 2 * 16


@pytest.mark.parametrize("name", DRAWN)
def test_prompts_are_of_the_vocabulary(name: str):
    for request in drawn(name):
        said = [*request.prompt_token_ids, *(token for message in request.later_messages for token in message)]
        assert all(token in VOCABULARY for token in said)


@pytest.mark.parametrize("name", DRAWN)
def test_both_sides_get_the_same_prompts(name: str):
    assert drawn(name, seed=3, repeat=1) == drawn(name, seed=3, repeat=1)


@pytest.mark.parametrize("name", ["shared-prefix", "extend", "rollout"])
def test_repeats_share_no_prefix_either(name: str):
    first, second = ({tuple(r.prompt_token_ids[:8]) for r in drawn(name, repeat=repeat)} for repeat in (0, 1))
    assert not first & second


def test_repeats_seeds_and_workloads_do_not_share_prompts():
    firsts = [
        tuple(workload_named(name).requests(VOCABULARY, seed, repeat)[0].prompt_token_ids[:32])
        for name in ("short", "chat")
        for seed in (0, 1)
        for repeat in (0, 1)
    ]
    assert len(set(firsts)) == len(firsts)


def test_longest_counts_prompt_and_output():
    assert workload_named("long").longest() == 3072 + 64


def test_longest_counts_all_turns():
    assert workload_named("multi-turn").longest() == 2048 + 3 * (128 + 32)


@pytest.mark.parametrize(
    ("name", "framework"), [("prefix_repetition", "vllm"), ("generated-shared-prefix", "sglang"), ("groups", None)]
)
def test_generators_belong_to_their_framework(name: str, framework: str | None):
    assert workload_named(name).framework == framework


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in DRAWN])
def test_what_a_framework_generates_is_not_drawn_here(name: str):
    assert workload_named(name).longest() == 2048 + 128 + 32
    with pytest.raises(LlmirError, match=f"workload {name} are made by"):
        drawn(name)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_report_has_room_for_the_title(name: str):
    assert len(f"{name}: {workload_named(name).description}") <= 100


def test_an_unknown_workload_is_an_error_that_names_the_known_ones():
    with pytest.raises(LlmirError, match=r"no workload 'fast'.*short, chat, long, mixed"):
        workload_named("fast")


@pytest.mark.parametrize(
    ("name", "prompt", "output"),
    [
        ("short", 16 * 128, 16 * 64),
        ("extend", 16 * 1024, 16),
        ("shared-prefix", 6144 + 16 * 128, 16 * 32),
        ("tree", 4 * 4096 + 16 * 128, 16 * 32),
        ("multi-turn", 2048 + 16 * 3 * 128, 16 * 3 * 32),
        ("prefix_repetition", 4 * 2048 + 32 * 128, 32 * 32),
    ],
)
def test_the_tokens_that_a_run_computes(name: str, prompt: int, output: int):
    assert workload_named(name).tokens() == Tokens(prompt, output)
