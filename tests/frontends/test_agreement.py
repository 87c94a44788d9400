"""Ranks whose plans do not go together are told so before they serve."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
from test_plan import PLAN

from llmir.errors import PlanError
from llmir.frontends.common.agreement import check_agreement
from llmir.plan import Plan

logger = logging.getLogger("llmir.test")


def check_on_all(plans: list[Plan]) -> None:
    """As the ranks do it, one after the other."""
    given: list[Any] = []
    for plan in plans:
        check_agreement(plan, lambda word: given.append(word) or [word], logger)
    for plan in plans:
        check_agreement(plan, lambda _: given, logger)


def with_blocks(size: int) -> Plan:
    kernel = PLAN.kernels[0]
    spec = replace(kernel.spec, attention=kernel.spec.attention.with_cache(block_size=size))
    return replace(PLAN, block_size=size, kernels=(replace(kernel, spec=spec),))


def test_equal_plans_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    check_on_all([PLAN, replace(PLAN, decisions=(), rank=1)])
    assert not caplog.records


def test_other_blocks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"rank 2 on .* for blocks of 32 tokens, rank 0 on .* of 128.*--page-size"):
        check_on_all([PLAN, PLAN, with_blocks(32)])


def test_another_processors_kernels_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    kernel = PLAN.kernels[0]
    narrow = replace(PLAN, kernels=(replace(kernel, spec=replace(kernel.spec, isa="avx2")),))
    check_on_all([PLAN, narrow])
    assert "rank 1 on" in caplog.text and "has other kernels than rank 0 on" in caplog.text
