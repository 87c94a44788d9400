"""Finds which requests of a step begin with the same blocks of the KV cache, by the numbers of the blocks alone.

Serving changes little from one step to the next. So the rows of the block table are kept sorted, each by as many blocks
as tell it from its neighbours, and only rows that came, went or changed within those blocks are taken out and put in
again. What neighbours share gives the tree.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from llmir.runtime.known_rows import KnownRows
from llmir.runtime.prefix_tree import PrefixTree
from llmir.runtime.runs import Bools, Int32, Int64, UInt32

BLOCK_BYTES = 4
#: Where more than one row in so many has changed, all are sorted anew.
REBUILT = 6


class PrefixFinder:
    """Finds the tree of each step; remembers the rows of earlier ones."""

    def __init__(self) -> None:
        self._rows = _SortedRows()
        self._tree: PrefixTree | None = None
        self._of: tuple[NDArray[np.generic], ...] = ()
        """Of the tree found last: the rows of its requests and which of them may share anything; the requests in order
        and what neighbours share."""

    def find(
        self, block_table: Int32, blocks: Int64, rows: Int64 | None = None, unchanged: Int64 | None = None
    ) -> PrefixTree:
        """The tree of a step.

        ``block_table``: int32 [rows, columns], the rows any distance apart; ``blocks`` [requests]: the leading blocks
        of each request that may be shared, at most ``columns``. What a row has after them is not looked at.
        ``rows`` and ``unchanged``: as in :class:`Step`.

        Gives the object it gave for the step before where the same requests share the same blocks as then: what was
        decided by the tree alone still holds. It says nothing of the blocks that are not shared, nor of new tokens.
        """
        table = block_table.view(np.uint32)  # not negative, for sorting
        rows = np.arange(len(blocks)) if rows is None else rows
        shares = blocks > 0
        same = self._rows.update(table, rows, blocks, unchanged)
        if same and self._tree is not None and _equal(self._of[:2], (rows, shares)):
            return self._tree
        order, common = self._rows.of(rows, shares)
        if not shares.all():
            order = np.append(order, (~shares).nonzero()[0])
            common = np.append(common, np.zeros(len(order) - 1 - len(common), np.int64))
        if self._tree is None or not _equal(self._of[2:], (order, common)):
            self._tree = PrefixTree.of(order, common)
        self._of = rows, shares, order, common
        return self._tree


def _equal(some: tuple[NDArray[np.generic], ...], others: tuple[NDArray[np.generic], ...]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


class _SortedRows:
    """Rows of a block table in sorted order, with the blocks that neighbours share.

    A row's key is as many of its blocks as tell it from its neighbours: those it shares with either, and one more. No
    other key begins with it, so what follows in the row changes nothing. A row that has no block more is open: it may
    go on as a neighbour does, and then it is put in again.
    """

    def __init__(self) -> None:
        self._order = np.empty(0, np.int64)
        """The rows, sorted."""
        self._listing = array("q")
        """The same; rows are put in here."""
        self._keys: list[str] = []
        """Of the rows of ``_order``, as text of one byte a character, which Python compares by memcmp."""
        self._listed = np.empty(0, bool)
        """[rows of the table], as all that follow: whether the row is in ``_order``."""
        self._next = np.empty(0, np.int64)
        """Blocks shared with the next row in order."""
        self._need = np.empty(0, np.int64)
        """Blocks of the row's key."""
        self._count = np.empty(0, np.int64)
        """Blocks that counted when a step last had the row."""
        self._open = np.empty(0, bool)
        self._known: KnownRows | None = None
        """What has to be compared; None where the caller knows what has changed."""

    def of(self, rows: Int64, shares: Bools) -> tuple[Int64, Int64]:
        """Requests with the rows ``rows``, of which those that may share are sorted; and what neighbours share."""
        request = np.full(len(self._listed), -1)
        request[rows[shares]] = shares.nonzero()[0]
        found = request[self._order]
        here = (found >= 0).nonzero()[0]
        if len(here) == len(found):
            return found, self._next[self._order[:-1]]
        return found[here], _least_between(self._next[self._order], here)

    def update(self, table: UInt32, rows: Int64, blocks: Int64, unchanged: Int64 | None) -> bool:
        """Takes the rows of a step, as PrefixFinder.find has them; whether the order is as it was."""
        self._grow(len(table))
        if unchanged is None:
            changed = self._compared(table, rows)
        else:
            changed, self._known = unchanged < self._need[: len(unchanged)], None
        gone = self._listed.copy()
        gone[: len(changed)] &= changed
        listed, counts = self._listed[rows], blocks > 0
        moved = gone[rows] | (blocks < self._need[rows]) | (self._open[rows] & (blocks != self._count[rows]))
        gone[rows[listed & moved]] = True
        come = rows[counts & (moved | ~listed)]
        self._count[rows[counts]] = blocks[counts]
        if not len(come) and not gone.any():
            return True
        if len(come) * REBUILT > np.count_nonzero(counts):
            self._rebuild(table, rows[counts])
        else:
            self._take_out(gone)
            self._put_in(table, come)
        return False

    def _compared(self, table: UInt32, rows: Int64) -> Bools:
        """[rows of the table]: whether a row has changed, or nobody can know."""
        changed = np.ones(len(self._listed), bool)
        if self._known is None:
            self._known = KnownRows()
        else:
            changed[rows] = self._known.changed(table, self._need)[rows]
        return changed

    def _grow(self, rows: int) -> None:
        more = rows - len(self._listed)
        if more > 0:
            for name in ("_listed", "_next", "_need", "_count", "_open"):
                before = getattr(self, name)
                setattr(self, name, np.append(before, np.zeros(more, before.dtype)))

    def _take_out(self, gone: Bools) -> None:
        """Takes rows out of the order."""
        stays = ~gone[self._order]
        kept = stays.nonzero()[0]
        order = self._order[kept]
        self._next[order[:-1]] = _least_between(self._next[self._order], kept)
        self._listed[gone] = False
        self._need[gone] = 0
        for place in (~stays).nonzero()[0][::-1].tolist():
            del self._listing[place], self._keys[place]
        self._order = order

    def _put_in(self, table: UInt32, come: Int64) -> None:
        """Puts rows in order that are not there."""
        order, keys = self._listing, self._keys
        fresh = np.zeros(len(self._listed), bool)
        waiting = come.tolist()
        while waiting:
            row = waiting[-1]
            key = _text(table, row, int(self._count[row]))
            place = bisect_right(keys, key)
            before = order[place - 1] if place else -1
            if place and not fresh[before] and not self._open[before] and key.startswith(keys[place - 1]):
                # The row before goes on like this one: which of them comes first, more of its blocks say.
                del order[place - 1], keys[place - 1]
                waiting.append(before)
                continue
            waiting.pop()
            order.insert(place, row)
            keys.insert(place, key)
            fresh[row] = True
        self._order = np.array(order, np.int64)
        self._listed |= fresh
        left, right = self._order[:-1], self._order[1:]
        near = fresh[left] | fresh[right]
        self._next[left[near]] = _common(table, left[near], right[near], self._count)
        self._cut_keys(table, fresh)

    def _rebuild(self, table: UInt32, rows: Int64) -> None:
        """Sorts ``rows``, and forgets all others."""
        self._take_out(self._listed.copy())
        self._listed[rows] = True
        self._order, self._keys = _sorted(table, rows, self._count[rows])
        self._listing = array("q", self._order.tobytes())
        left, right = self._order[:-1], self._order[1:]
        self._next[left] = _common(table, left, right, self._count)
        self._cut_keys(table, self._listed)

    def _cut_keys(self, table: UInt32, fresh: Bools) -> None:
        """Cuts the keys to what rows need, where that has changed and of all ``fresh`` rows."""
        order = self._order
        common = np.zeros(len(order) + 1, np.int64)  # with the row before
        common[1:-1] = self._next[order[:-1]]
        shared, count = np.maximum(common[:-1], common[1:]), self._count[order]
        need = np.minimum(shared + 1, count)
        cut = (fresh[order] | (need != self._need[order])).nonzero()[0]
        self._need[order], self._open[order] = need, count <= shared
        for place, row, blocks in zip(cut.tolist(), order[cut].tolist(), need[cut].tolist(), strict=True):
            self._keys[place] = _text(table, row, blocks)
        if self._known is not None:
            self._known.keep(table, self._need)


def _sorted(table: UInt32, rows: Int64, counts: Int64) -> tuple[Int64, list[str]]:
    """``rows`` in sorted order, and their keys of ``counts`` [rows] blocks each."""
    used = np.ascontiguousarray(table[rows, : counts.max(initial=0)])
    text, row_bytes = str(used.data, "latin-1"), used.strides[0]
    begins, sizes = range(0, len(rows) * row_bytes, max(row_bytes, 1)), (BLOCK_BYTES * counts).tolist()
    keys = [text[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return rows[order], [keys[place] for place in order]


def _text(table: UInt32, row: int, blocks: int) -> str:
    return str(table[row, :blocks].data, "latin-1")


def _common(table: UInt32, left: Int64, right: Int64, counts: Int64) -> Int64:
    """Blocks that each row of ``left`` shares with that of ``right``; ``counts``: the blocks that count, by row."""
    limit = np.minimum(counts[left], counts[right])
    width = int(limit.max(initial=0))
    if not width:
        return limit
    differs = table[left, :width] != table[right, :width]
    first = differs.argmax(axis=1)
    alike = ~differs[np.arange(len(first)), first]
    first[alike] = width
    return np.minimum(first, limit)


def _least_between(common: Int64, places: Int64) -> Int64:
    """What neighbours at ``places`` share, where only those stay; ``common``: what each shares with the next."""
    if len(places) < 2:
        return np.empty(0, np.int64)
    return np.minimum.reduceat(common[: places[-1]], places[:-1])
