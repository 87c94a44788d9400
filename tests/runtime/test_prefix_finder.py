"""Finders that saw other steps: whatever came, went, grew or changed its row, they find what a new one finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefix_tree import Step, edges_by_definition, edges_of, numbers, short_rows

from llmir.runtime import prefix_finder
from llmir.runtime.prefix_finder import REBUILT, PrefixFinder, _SortedRows

ROWS, COLUMNS = 12, 24


class Table:
    """A block table in which requests have rows of their own, and what has changed in it since the last step."""

    def __init__(self, tells: bool):
        """``tells``: whether a finder is told what has changed."""
        self.blocks = np.zeros((ROWS, COLUMNS), np.int32)
        self.count = np.zeros(ROWS, np.int64)
        self._tells, self._before = tells, self.blocks.copy()
        self._finder = PrefixFinder()

    def put(self, row: int, blocks: list[int]) -> None:
        self.blocks[row, : len(blocks)] = blocks[:COLUMNS]
        self.count[row] = min(len(blocks), COLUMNS)

    def row(self, row: int) -> list[int]:
        return self.blocks[row, : self.count[row]].tolist()

    def check(self, rows: list[int], spare: int = COLUMNS, below: int = ROWS) -> None:
        """A step of the requests in ``rows``; where nothing is told, by a table with as few columns as they need and
        some to spare, and as few rows and some ``below``."""
        same = self.blocks == self._before
        unchanged = np.where(same.all(axis=1), COLUMNS, same.argmin(axis=1)) if self._tells else None
        self._before = self.blocks.copy()
        step = Step([], [])
        step.table, step.blocks = self.blocks[rows], self.count[rows]
        table = self.blocks
        if not self._tells:
            table = table[: max(rows, default=-1) + 1 + below, : int(self.count[rows].max(initial=0)) + spare]
        found = self._finder.find(table, self.count[rows], np.array(rows, np.int64), unchanged)
        assert edges_of(found) == edges_by_definition(step)
        assert sorted(found.order.tolist()) == list(range(len(rows)))


@settings(max_examples=400)
@given(st.data(), st.booleans(), st.booleans())
def test_requests_in_rows_of_their_own(data: st.DataObject, tells: bool, sorts_anew: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if not sorts_anew:
            patch.setattr(prefix_finder, "REBUILT", 0)
        serve(data, Table(tells))


def serve(data: st.DataObject, table: Table) -> None:
    """Steps of serving, each checked."""
    row = st.integers(0, ROWS - 1)
    for _ in range(data.draw(st.integers(1, 8))):
        for change in data.draw(st.lists(st.sampled_from(["come", "grow", "cut", "rewrite", "garbage"]), max_size=6)):
            which, like = data.draw(row), data.draw(row)
            match change:
                case "come":
                    other = table.row(like)
                    table.put(which, other[: data.draw(st.integers(0, len(other)))] + data.draw(short_rows))
                case "grow":
                    table.put(which, [*table.row(which), data.draw(numbers)][:COLUMNS])
                case "cut":
                    table.count[which] = data.draw(st.integers(0, int(table.count[which])))
                case "rewrite":
                    whole = min(table.count[which], table.count[like])
                    table.blocks[which, :whole] = table.blocks[like, :whole]
                case _:
                    table.blocks[which, table.count[which] :] = data.draw(numbers)
        table.check(data.draw(st.lists(row, unique=True)), *data.draw(st.tuples(row, row)))


@pytest.mark.parametrize("tells", [False, True])
def test_one_more_request_is_put_in_without_sorting_all_anew(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rebuilt, rebuild = [], _SortedRows._rebuild
    monkeypatch.setattr(_SortedRows, "_rebuild", lambda self, *given: rebuilt.append(given) or rebuild(self, *given))
    table, requests = Table(tells), list(range(REBUILT + 2))
    for row in requests:
        table.put(row, [1, 2, 3, 10 + row, 30 + row])
    table.check(requests)
    table.put(ROWS - 1, [1, 2, 3, 10, 30, 5])
    table.check([*requests, ROWS - 1])
    table.check(requests[1:])
    assert len(rebuilt) == 1


def test_a_row_that_changed_while_it_was_away_is_another() -> None:
    table = Table(tells=True)
    for row, blocks in enumerate(([1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], *([7 + i] for i in range(8)))):
        table.put(row, blocks)
    everybody = list(range(11))
    table.check(everybody)
    table.put(1, [1, 9, 3, 5])
    table.check([row for row in everybody if row != 1])
    table.check(everybody)


def test_a_table_may_become_narrower_than_what_was_compared() -> None:
    table, finder = np.zeros((4, 8), np.int32), PrefixFinder()
    table[:2], table[2], table[3] = np.arange(1, 9), 20, 30
    assert finder.find(table, np.full(4, 8)).end.tolist() == [8]
    narrow = table[:, :4].copy()
    narrow[0, 2] = 77
    assert finder.find(narrow, np.full(4, 4)).end.tolist() == [2]
