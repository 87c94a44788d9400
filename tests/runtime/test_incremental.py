"""A scheduler that saw other steps makes the work lists of a new one, whatever came, went, grew or is shared."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_schedule import COSTS, POLICY, scheduler, tokens_of

from llmir.ir.kernel_spec import StepPolicy
from llmir.kernels.work_list import Item
from llmir.runtime.schedule import Schedule
from llmir.runtime.split import ByThread
from llmir.runtime.step import Step

ROWS, COLUMNS, BLOCK = 10, 12, 16
#: Of requests with few rows some parts pay and others do not.
DEAR = replace(POLICY, sharing=replace(COSTS, decode_row_key=0.1, row=40.0, margin=1.0))


class Served:
    """Requests in a block table, of which several schedulers make work lists: an old one, and a new one every step."""

    def __init__(self, tells: bool, **made_with: Any):
        self.table, self.lengths = np.arange(ROWS * COLUMNS, dtype=np.int32).reshape(ROWS, COLUMNS), np.full(ROWS, 100)
        self._new_blocks = iter(range(ROWS * COLUMNS, 1 << 30))
        self._tells, self._seen = tells, np.full_like(self.table, -1)
        self._made_with = made_with
        self._old = scheduler(**made_with)

    def renew(self, row: int, begin: int, end: int = COLUMNS) -> None:
        """Gives ``row`` blocks of its own."""
        self.table[row, begin:end] = [next(self._new_blocks) for _ in range(begin, end)]

    def check(self, rows: list[int], new_tokens: list[int] | None = None) -> Schedule:
        new = np.array(new_tokens or [1] * len(rows))
        lengths = np.maximum(self.lengths[rows], new).astype(np.int32)
        same = self.table == self._seen
        unchanged = np.where(same.all(axis=1), COLUMNS, same.argmin(axis=1)) if self._tells else None
        self._seen = self.table.copy()
        start = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        step = Step(start, lengths, self.table, np.array(rows), unchanged)
        found, anew = (
            made.schedule(replace(step, unchanged=told), ByThread(2))
            for made, told in ((self._old, unchanged), (scheduler(**self._made_with), None))
        )
        assert _read(found) == _read(anew)
        assert (found.shared_requests, found.keys_not_read) == (anew.shared_requests, anew.keys_not_read)
        return found


def _read(schedule: Schedule) -> list[tuple[int, ...]]:
    """Of each item, which keys it reads, for which tokens, and whether it leaves states."""
    return sorted(
        (item[Item.KEY_BEGIN], item[Item.KEY_END], item[Item.STATE] >= 0, *sorted(tokens_of(item, schedule.merges)))
        for item in schedule.items
    )


@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([0, 40]), st.sampled_from([POLICY, DEAR]))
def test_steps_of_serving(data: st.DataObject, tells: bool, window: int, policy: StepPolicy) -> None:
    served, row = Served(tells, window=window, policy=policy), st.integers(0, ROWS - 1)
    for _ in range(data.draw(st.integers(2, 6))):
        for change in data.draw(st.lists(st.sampled_from(["come", "grow", "share", "part"]), max_size=4)):
            which, other, block = data.draw(row), data.draw(row), data.draw(st.integers(0, COLUMNS - 1))
            if change == "come":
                served.renew(which, 0)
                served.lengths[which] = data.draw(st.integers(1, COLUMNS * BLOCK))
            elif change == "grow":
                served.lengths[which] = min(served.lengths[which] + data.draw(st.integers(1, 40)), COLUMNS * BLOCK)
            elif change == "share":
                served.table[which, :block] = served.table[other, :block]
            else:
                served.renew(which, block)
        rows = data.draw(st.lists(row, min_size=1, unique=True))
        served.check(rows, data.draw(st.none() | st.just([1 + number % 3 for number in rows])))


@pytest.fixture(params=[False, True], ids=["compares", "is told"])
def group(request: pytest.FixtureRequest) -> Served:
    """Requests 0 to 3 share five blocks, and the others nothing."""
    served = Served(tells=request.param)
    served.table[1:4, :5] = served.table[0, :5]
    assert served.check(list(range(ROWS))).keys_not_read == 3 * 5 * BLOCK
    return served


def test_lengths_change_and_no_row_does(group: Served) -> None:
    group.lengths[:] = np.arange(ROWS) * 19 + 1
    assert group.check(list(range(ROWS))).shared_requests == 3
    group.lengths[:] = 120
    assert group.check(list(range(ROWS))).shared_requests == 4


def test_a_group_dissolves(group: Served) -> None:
    for row in range(3):
        group.renew(row, 0)
    assert group.check(list(range(ROWS))).shared_requests == 0


def test_what_a_group_shares_becomes_less_and_more(group: Served) -> None:
    group.renew(2, 1)
    assert group.check(list(range(ROWS))).shared_requests == 4
    group.table[1:4] = group.table[0]
    assert group.check(list(range(ROWS))).keys_not_read == 3 * 6 * BLOCK


def test_all_of_a_group_change_the_same_block(group: Served) -> None:
    group.table[:4, 2] = 1 << 20
    assert group.check(list(range(ROWS))).shared_requests == 4
    group.table[4:6, :5] = group.table[0, :5]
    assert group.check(list(range(ROWS))).shared_requests == 6


def test_the_same_rows_in_another_order(group: Served) -> None:
    group.check([*range(5, ROWS), 3, 0, 2, 1, 4])


def test_other_numbers_of_new_tokens_in_the_same_rows(group: Served) -> None:
    assert group.check(list(range(ROWS)), [1, 4, 5, 1] + [1] * 6).shared_requests == 3
    assert group.check(list(range(ROWS))).shared_requests == 4


def test_a_row_comes_back_as_another(group: Served) -> None:
    group.check([0, *range(2, ROWS)])
    group.renew(1, 3)
    assert group.check(list(range(ROWS))).shared_requests == 4
