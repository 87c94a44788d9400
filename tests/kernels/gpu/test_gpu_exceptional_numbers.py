"""NaN and infinite scores in the GPU programs: NaN where the float64 definition has it, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from gpu_cases import ALWAYS_SHARED, Case, attention, variants

#: One has enough new tokens for a tile of keys that all of its rows see, which goes without masks.
REQUESTS = [(100, 1), (110, 1), (96, 64), (140, 3)]


def step(**more) -> Case:
    """Two requests share 64 tokens; all heads of all queries point the same way in one dimension."""
    facts = {"variants": variants(2, rows=64), "prefixes": {1: (0, 4)}, **more}
    made = Case(REQUESTS, **facts)
    made.query[:, :, 3] = 1.0
    return made


def set_keys(made: Case, value: float, request: int, begin: int, end: int) -> None:
    """One dimension of a request's cached keys."""
    position = np.arange(begin, end)
    block = made.table[request, position // made.attention.cache.block_size]
    made.before[block, :, 0, position % made.attention.cache.block_size, 3] = value


@pytest.fixture(params=["whole", "parts"])
def cut(request):
    """How the step is cut into items."""
    return {} if request.param == "whole" else {"sharing": ALWAYS_SHARED, "split_keys": 32, "workers": 6}


@pytest.mark.parametrize("facts", [{}, {"dtype": "bf16"}, {"soft_cap": 5.0}, {"window": 90}], ids=str)
def test_a_key_that_is_nan_makes_nan_of_those_who_see_it(cut, facts):
    made = step(attention=attention(**facts), **cut)
    set_keys(made, np.nan, 0, 50, 51)
    set_keys(made, np.nan, 2, 95, 96)
    made.check(roundings=2)
    assert 0 < np.isnan(made.expected()).mean() < 1


@pytest.mark.parametrize("infinite", [np.inf, -np.inf])
@pytest.mark.parametrize(("begin", "end"), [(0, 64), (32, 70)])
def test_infinite_scores(cut, infinite, begin, end):
    made = step(**cut)
    for request in (0, 2):
        set_keys(made, infinite, request, begin, end)
    made.check(roundings=2)


def test_no_score_above_minus_infinity_has_no_answer(cut):
    made = step(**cut)
    set_keys(made, -np.inf, 2, 0, 96)
    made.key[2:66, :, 3] = -np.inf
    made.check(roundings=2)
    assert np.isnan(made.expected()[2:66]).all()
