from __future__ import annotations

import json
import math

import pytest

from llmir.compare.quality import (
    Answers,
    Continuation,
    agreement,
    english_text,
    judge,
    logprob_differences,
    perplexity,
    pieces,
)
from llmir.errors import LlmirError


def continuation(*tokens: int, logprobs: list[dict[int, float]] | None = None) -> Continuation:
    return Continuation(list(tokens), logprobs or [{token: -1.0} for token in tokens], 0)


def test_agreement_is_the_share_of_equal_continuations():
    one = [continuation(1, 2), continuation(3, 4), continuation(5, 6), continuation(7, 8)]
    other = [continuation(1, 2), continuation(3, 9), continuation(5, 6), continuation(7, 8)]
    assert agreement(one, other) == 0.75


def test_logprobs_are_compared_up_to_the_first_place_of_different_choice():
    one = continuation(1, 2, 3, logprobs=[{1: -0.5}, {2: -0.7, 9: -0.8}, {3: -0.1}])
    other = continuation(1, 9, 3, logprobs=[{1: -0.6}, {9: -0.6, 2: -0.9}, {3: -9.0}])
    assert logprob_differences([one], [other]) == pytest.approx([0.1, 0.2])


def test_a_choice_the_other_side_did_not_record_is_left_out():
    one = continuation(1, 2, logprobs=[{1: -0.5}, {2: -0.7}])
    other = continuation(1, 9, logprobs=[{1: -0.5}, {9: -0.6}])
    assert logprob_differences([one], [other]) == [0.0]


def test_perplexity_of_even_odds_is_the_number_of_choices():
    assert perplexity([[math.log(1 / 8)] * 3, [math.log(1 / 8)] * 5]) == pytest.approx(8.0)


def test_pieces_are_spread_and_do_not_overlap():
    assert pieces(range(100), count=3, length=20) == [list(range(i, i + 20)) for i in (0, 33, 66)]


def test_too_short_a_text_is_an_error():
    with pytest.raises(LlmirError, match="too few for 3 pieces of 40"):
        pieces(range(100), count=3, length=40)


def test_the_text_is_english_and_long_enough():
    text = english_text()
    assert len(text) > 300_000
    assert " the " in text


def test_perplexity_difference_is_relative_to_the_baseline():
    baseline = Answers([continuation(1)], [continuation(1)], [[-math.log(10.0)]])
    llmir = Answers([continuation(1)], [continuation(1)], [[-math.log(9.0)]])
    assert judge("vllm", baseline, llmir).perplexity_relative_difference == pytest.approx(0.1)


def test_the_framework_is_judged_against_itself_cold_and_cached():
    baseline = Answers([continuation(1), continuation(2)], [continuation(1), continuation(9)], [[-1.0]])
    llmir = Answers([continuation(1), continuation(2)], [continuation(1), continuation(2)], [[-1.0]])
    quality = judge("vllm", baseline, llmir)
    assert quality.greedy_agreement == 1.0
    assert quality.greedy_agreement_baseline_with_itself == 0.5


def test_answers_survive_json():
    answers = Answers([continuation(1, 2)], [continuation(3)], [[-0.5]])
    assert Answers.from_json(json.loads(json.dumps(answers.to_json()))) == answers
