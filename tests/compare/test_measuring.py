from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir.compare.measuring import METRICS, Pace, RequestRecord, Tokens, figures, steady_time_per_output_token
from llmir.errors import LlmirError


def test_steady_decode_leaves_out_the_prefill_of_other_requests():
    # The first request's tokens at 1 and 11 s surround the second's prefill; from 11 s on a step takes 1 s.
    early = RequestRecord(100, 0.0, [1.0, 11.0, 12.0, 13.0, 14.0], 0)
    late = RequestRecord(100, 0.0, [11.0, 12.0, 13.0, 14.0, 15.0], 0)
    assert steady_time_per_output_token([early, late]) == 1.0


def test_steady_decode_ends_with_the_first_request_to_finish():
    short = RequestRecord(10, 0.0, [1.0, 2.0, 3.0], 0)
    long = RequestRecord(10, 0.0, [1.0, 2.0, 3.0, 3.1, 3.2], 0)
    assert steady_time_per_output_token([short, long]) == 1.0


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=16),
    st.integers(1, 50),
    st.floats(1e-3, 10.0),
)
def test_lock_step_decode_is_measured_as_its_step(waits: list[int], tokens: int, step: float):
    last = max(waits)
    records = [RequestRecord(1, 0.0, [step * i for i in range(wait, last + tokens + 1)], 0) for wait in waits]
    assert steady_time_per_output_token(records) == pytest.approx(step)


def test_each_turn_of_conversations_has_a_steady_part_of_its_own():
    first = [RequestRecord(10, 0.0, [1.0, 2.0, 3.0], 0), RequestRecord(10, 0.0, [1.5, 2.0, 3.0], 0)]
    later = [RequestRecord(10, 3.0, [9.0, 12.0, 15.0], 0, turn=1)]
    # 2 x 1.5 s for 4 tokens, then 6 s for 2.
    assert steady_time_per_output_token([*first, *later]) == (2 * 1.5 + 6) / 6


def test_without_a_moment_of_common_decode_there_is_no_figure():
    done = RequestRecord(10, 0.0, [1.0, 2.0], 0)
    late = RequestRecord(10, 0.0, [3.0, 4.0], 0)
    with pytest.raises(LlmirError, match="no steady decode"):
        steady_time_per_output_token([done, late])


def test_a_request_without_tokens_is_an_error():
    with pytest.raises(LlmirError, match="no output token"):
        figures([RequestRecord(10, 0.0, [], 0)])


def test_rates_are_over_the_whole_run():
    measured = figures([RequestRecord(30, 5.0, [6.0, 7.0, 8.0], 0), RequestRecord(10, 5.5, [6.0, 8.0, 9.0], 0)])
    assert measured["output_tokens_per_second"] == 6 / 4
    assert measured["total_tokens_per_second"] == 46 / 4


def test_time_to_first_token_is_the_median_over_requests():
    submitted_and_first = [(0.0, 1.0), (1.0, 3.0), (2.0, 12.0)]
    records = [RequestRecord(1, submitted, [first, 20.0], 0) for submitted, first in submitted_and_first]
    assert figures(records)["time_to_first_token"] == 2.0


def test_where_every_request_asks_for_one_token_there_is_no_time_per_output_token():
    measured = figures([RequestRecord(1024, 0.0, [2.0], 1023), RequestRecord(1024, 0.0, [4.0], 1023)])
    assert measured["time_to_first_token"] == 3.0
    assert measured["output_tokens_per_second"] == 0.5
    assert "time_per_output_token" not in measured


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_speedup_above_one_is_better(metric):
    worse, better = (2.0, 1.0) if metric.lower_is_better else (1.0, 2.0)
    assert metric.speedup(baseline=worse, llmir=better) == 2.0


def test_a_pace_is_of_prompts_until_all_requests_have_begun_and_of_answers_since_then():
    early = RequestRecord(100, 0.0, [2.0, 4.0, 5.0, 6.0], 0)
    late = RequestRecord(120, 0.0, [4.0, 5.0, 6.0], 20)
    assert Pace.of([early, late]) == Pace(prompt=4.0 / 200, output=2.0 / 4)
    assert Pace.of([RequestRecord(10, 0.0, [2.0], 0)]) == Pace(prompt=0.2, output=0.0)


def test_the_slower_of_two_paces_is_slower_in_both():
    assert Pace(0.1, 0.5).slower(Pace(0.2, 0.4)) == Pace(0.2, 0.5)
    assert Pace(0.1, 0.5).seconds(Tokens(20, 4)) == 4.0
