from __future__ import annotations

import pytest

from llmir.compare.workloads import WORKLOADS, workload_named
from llmir.errors import LlmirError

VOCABULARY = range(100, 40000)


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


@pytest.mark.parametrize("name", WORKLOADS)
def test_prompts_are_of_the_vocabulary(name: str):
    requests = workload_named(name).requests(VOCABULARY, seed=0, repeat=0)
    assert all(token in VOCABULARY for request in requests for token in request.prompt_token_ids)


def test_both_sides_get_the_same_prompts():
    chat = workload_named("chat")
    assert chat.requests(VOCABULARY, seed=3, repeat=1) == chat.requests(VOCABULARY, seed=3, repeat=1)


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


def test_an_unknown_workload_is_an_error_that_names_the_known_ones():
    with pytest.raises(LlmirError, match=r"no workload 'fast'.*short, chat, long, mixed"):
        workload_named("fast")
