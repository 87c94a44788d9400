"""NaN, infinite and very large scores: each row of outputs is what the reference says, and no other row knows of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: F401 - brings the OpenMP runtime
from attention_cases import (
    ROW_ERROR,
    RUNNABLE_ISAS,
    SHARED,
    WIDE,
    Batch,
    Inputs,
    attend,
    emulate_wide,
    expected,
    layout_of,
    row_error,
    spec_of,
)

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import StepPolicy
from llmir.kernels import reference

#: Requests of which two share 128 tokens, one decodes alone and one is a prompt.
BATCH = Batch(
    cached=(200, 0, 130, 140), new=(1, 40, 1, 2), threads=2, prefixes=((0, 0), (1, 0), (0, 128), (3, 0)), appends=False
)
PROMPT, SHARER, ALONE = 1, 2, 3
POLICIES = {
    "whole": StepPolicy(decode_tokens=1, split_keys=1 << 20, items_per_thread=1),
    "parts": StepPolicy(decode_tokens=1, split_keys=32, items_per_thread=100, sharing=SHARED),
}
#: Powers of two of queries and keys whose scores, at a scale of 4, are 2**30 and more, as far as the type goes.
LARGE = {"bf16": [(14, 14), (60, 60)], "f16": [(14, 14), (15, 15)], "f32": [(14, 14), (60, 60)]}


@pytest.fixture(params=[*RUNNABLE_ISAS, WIDE])
def isa(request, monkeypatch):
    if request.param == WIDE:
        emulate_wide(monkeypatch)
    return request.param


@pytest.fixture(params=["bf16", "f16", "f32"])
def element_type(request):
    return request.param


@pytest.fixture(params=POLICIES)
def policy(request):
    return POLICIES[request.param]


class Case:
    """A step whose numbers a test changes before it is run."""

    def __init__(self, isa: str, element_type: str, block_size: int = 32, scale: float = 0.125, **more):
        layout = layout_of(element_type, isa, block_size)
        self.attention = AttentionSpec.dense(6, 2, 64, element_type, block_size, scale, layout=layout, **more)
        self.spec = spec_of(self.attention, isa)
        self.inputs = Inputs(self.attention, BATCH)

    def number(self, value: float | np.ndarray) -> np.ndarray:
        return reference.encode(np.asarray(value, np.float32), self.attention.dtype)

    def cached(self, what: str, request: int, begin: int, end: int | None = None) -> tuple[np.ndarray, tuple]:
        """A cache and the index [tokens, KV heads, head size] in it of a request's tokens."""
        position = np.arange(begin, begin + 1 if end is None else end)
        size = self.attention.cache.block_size
        block = self.inputs.block_table[request, position // size]
        cache = self.inputs.expected_caches[("keys", "values").index(what)]
        return cache, (block, slice(None), position % size)

    def set_keys(self, value: float, request: int, begin: int, end: int | None = None, head=slice(None), dim=3) -> None:
        cache, (block, _, offset) = self.cached("keys", request, begin, end)
        cache[block, head, offset, dim] = self.number(value)

    def set_scores(self, query: float, keys: np.ndarray, request: int) -> None:
        """A request whose scores are the exact products of ``query`` and ``keys``."""
        rows = slice(self.inputs.query_start[request], self.inputs.query_start[request + 1])
        self.inputs.query[rows] = self.number(0.0)
        self.inputs.query[rows, :, 0] = self.number(query)
        cache, index = self.cached("keys", request, 0, len(keys))
        cache[index] = self.number(0.0)
        self.set_keys(0.0, request, 0, len(keys), dim=0)
        block, _, offset = index
        cache[block, :, offset, 0] = self.number(keys)[:, None]

    def check(self, policy: StepPolicy) -> np.ndarray:
        """Runs the step; gives which tokens' heads are NaN, bool [tokens, heads]."""
        found, exact = attend(self.spec, self.inputs, policy), expected(self.inputs)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
        nan = np.isnan(exact).any(axis=-1)
        if not nan.all():
            assert row_error(found[~nan], exact[~nan]) < ROW_ERROR[self.attention.dtype]
        return nan


@pytest.mark.parametrize("more", [{}, {"soft_cap": 5.0}, {"window": 150}, {"block_size": 1}], ids=str)
def test_a_key_that_is_nan_makes_nan_of_those_who_see_it(isa, element_type, policy, more):
    case = Case(isa, element_type, **more)
    case.set_keys(np.nan, SHARER, 100, head=1)
    case.set_keys(np.nan, PROMPT, 17, head=0)
    nan = case.check(policy)
    assert nan[0, 3:].all() and nan[41, 3:].all(), "who shares the key"
    assert nan[1 + 17 : 1 + 40, :3].all() and nan.sum() == 2 * 3 + 23 * 3


def test_a_query_that_is_nan_makes_nan_of_its_head(isa, element_type, policy):
    case = Case(isa, element_type)
    case.inputs.query[[0, 7], [4, 1], 5] = case.number(np.nan)
    assert np.argwhere(case.check(policy)).tolist() == [[0, 4], [7, 1]]


@pytest.mark.parametrize("more", [{}, {"soft_cap": 5.0}, {"window": 150}, {"block_size": 1}], ids=str)
def test_infinite_scores(isa, element_type, policy, more):
    """An infinite key's scores are of the sign of what the query has there."""
    case = Case(isa, element_type, **more)
    for request in (SHARER, PROMPT, ALONE):
        case.set_keys(np.inf, request, 20, 24)
    if "soft_cap" not in more:
        assert 0 < case.check(policy).mean() < 1
    else:
        assert not case.check(policy).any()


def test_no_score_above_minus_infinity_has_no_answer(isa, element_type, policy):
    case = Case(isa, element_type)
    case.inputs.query[:, :, 3] = case.number(1.0)
    case.set_keys(-np.inf, PROMPT, 0, 12)
    case.set_keys(-np.inf, ALONE, 0, 142, head=1)
    nan = case.check(policy)
    assert nan[1:13].all() and nan[-2:, 3:].all() and nan.sum() == 12 * 6 + 2 * 3


@pytest.mark.parametrize(("begin", "end"), [(0, 96), (64, 130), (1, 131)])
def test_scores_of_minus_infinity_weigh_nothing(isa, element_type, policy, begin, end):
    case = Case(isa, element_type)
    case.inputs.query[:, :, 3] = case.number(1.0)
    case.set_keys(-np.inf, SHARER, begin, end)
    case.set_keys(-np.inf, ALONE, begin, end)
    assert not case.check(policy).any()


@pytest.mark.parametrize("size", [0, 1], ids=["2**30", "most"])
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_leave_the_largest(isa, element_type, policy, size, sign):
    query, key = LARGE[element_type][size]
    case = Case(isa, element_type, scale=4.0)
    factors = 1 + np.random.default_rng(size).integers(0, 100, 131) / 128
    case.set_scores(sign * 2.0**query, factors * 2.0**key, SHARER)
    case.set_scores(sign * 2.0**query, factors[:40] * 2.0**key, PROMPT)
    assert not case.check(policy).any()


def test_large_scores_that_are_equal_weigh_the_same(isa, element_type, policy):
    query, key = LARGE[element_type][1]
    case = Case(isa, element_type, scale=3.7)
    case.set_scores(2.0**query, np.full(131, 1.25 * 2.0**key), SHARER)
    case.set_scores(-(2.0**query), np.full(40, 1.25 * 2.0**key), PROMPT)
    assert not case.check(policy).any()


def test_a_value_that_a_row_does_not_see_has_no_weight_however_large(isa, policy):
    case = Case(isa, "f32")
    cache, index = case.cached("values", PROMPT, 39)
    cache[index] = np.float32(3e38)
    assert not case.check(policy).any()
