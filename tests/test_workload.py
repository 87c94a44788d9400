import json
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir.compare.workloads import WORKLOADS
from llmir.workload import DEFAULT, NAMED, Request, Workload, WorkloadError

requests = st.builds(Request, st.integers(1, 500), st.integers(1, 100))
workloads = st.lists(requests, min_size=1, max_size=5).map(lambda r: Workload("test", tuple(r), 4, "a test"))


def lengths(workload: Workload) -> list[int]:
    """Sequence length at each decode step of each request."""
    return [
        length
        for request in workload.requests
        for length in range(request.prompt_tokens + 1, request.prompt_tokens + request.output_tokens + 1)
    ]


@given(workloads, st.sampled_from([1, 16, 32, 128]))
def test_padding_is_the_mean_over_all_decode_steps(workload, block_size):
    padding = [ceil(length / block_size) * block_size - length for length in lengths(workload)]
    assert workload.mean_padding_tokens(block_size) == pytest.approx(sum(padding) / len(padding))


@given(workloads, st.integers(0, 600))
def test_decode_tokens_are_the_mean_over_all_decode_steps(workload, window):
    seen = [min(length, window) if window else length for length in lengths(workload)]
    assert workload.mean_decode_tokens(window) == pytest.approx(sum(seen) / len(seen))


def test_requests_without_a_shared_prefix_recompute_nothing():
    assert NAMED["chat"].mean_recomputed_tokens(128) == 0


def test_a_shared_prefix_costs_half_a_block():
    workload = Workload("test", (Request(1000, 10, 500), Request(1000, 10)), 2, "a test")
    assert workload.mean_recomputed_tokens(129) == 32


def test_a_prefix_shorter_than_a_block_costs_at_most_itself():
    assert Workload("test", (Request(1000, 10, 20),), 1, "a test").mean_recomputed_tokens(256) == 20


@pytest.mark.parametrize("name", NAMED)
def test_names_mean_the_shapes_that_compare_runs(name):
    run = WORKLOADS[name].requests(range(1), seed=0, repeat=0)
    shapes = [(len(request.prompt_token_ids), request.max_tokens) for request in run]
    assert [(r.prompt_tokens, r.output_tokens) for r in NAMED[name].requests] == shapes


@given(requests, st.integers(0, 600))
def test_prefill_keys_leave_the_shared_prefix_out(request, window):
    alone = Workload("test", (request,), 1, "a test").mean_prefill_keys(window)
    shared = replace(request, shared_tokens=request.prompt_tokens // 2)
    rest = range(shared.shared_tokens + 1, shared.prompt_tokens + 1)
    seen = [min(token, window) if window else token for token in rest]
    assert Workload("test", (shared,), 1, "a test").mean_prefill_keys(window) == sum(seen) <= alone


def test_nothing_said_is_all_named_workloads_and_shared_prompts():
    assert Workload.load() is DEFAULT
    named = [request for workload in NAMED.values() for request in workload.requests]
    assert list(DEFAULT.requests[: len(named)]) == named
    assert {request.shared_tokens for request in DEFAULT.requests[len(named) :]} == {512}


def test_a_name_loads_that_workload():
    assert Workload.load("chat") is NAMED["chat"]


@pytest.mark.parametrize("workload", [*NAMED.values(), DEFAULT], ids=lambda w: w.name)
def test_json_round_trip(workload):
    assert Workload.from_json(json.loads(json.dumps(workload.to_json()))) == workload


def test_a_written_workload_loads(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(NAMED["mixed"].to_json()))
    assert Workload.load(str(path)) == NAMED["mixed"]


def test_a_trace_of_json_lines_loads(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"prompt_tokens": 5, "output_tokens": 2}\n{"prompt_tokens": 7, "output_tokens": 1, "shared_tokens": 3}\n'
    )
    workload = Workload.load(str(path))
    assert workload.requests == (Request(5, 2), Request(7, 1, 3))
    assert (workload.name, workload.concurrency, workload.source) == ("trace", 2, str(path))


def test_a_plain_list_of_requests_loads(tmp_path):
    path = tmp_path / "list.json"
    path.write_text('[{"prompt_tokens": 5, "output_tokens": 2}]')
    assert Workload.load(str(path)).requests == (Request(5, 2),)


def test_no_such_workload_names_the_known_ones():
    with pytest.raises(WorkloadError, match="no workload 'chatt': it is none of short, chat, long, mixed"):
        Workload.load("chatt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "is not JSON"),
        ("{}", "no list of requests"),
        ("[]", "has no requests"),
        ('[{"prompt_tokens": 5}]', "request 0 needs prompt_tokens"),
        ("[5]", "request 0 needs prompt_tokens"),
        ('[{"prompt_tokens": 0, "output_tokens": 1}]', "request 0: prompt_tokens of a request must be"),
        ('[{"prompt_tokens": 5, "output_tokens": 1.5}]', "request 0: output_tokens"),
        ('[{"prompt_tokens": 5, "output_tokens": 1, "shared_tokens": 6}]', "cannot share 6 tokens of a prompt of 5"),
        ('{"requests": [{"prompt_tokens": 5, "output_tokens": 2}], "batch": 3}', "unknown fields"),
        ('{"requests": [{"prompt_tokens": 5, "output_tokens": 2}], "concurrency": 0}', "concurrency"),
    ],
)
def test_a_bad_file_is_a_workload_error(tmp_path, text, message):
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(WorkloadError, match=message):
        Workload.load(str(path))
