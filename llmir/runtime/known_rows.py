"""A copy of rows of a block table, to see which of them have changed since."""

from __future__ import annotations

import numpy as np

from llmir.runtime.runs import Bools, Int64, UInt32

#: Rows are cut into so many chunks; picking and comparing one costs about as much as comparing 16 KB more.
CHUNKS = 8
#: So many more may follow before all rows are cut anew.
MORE_CHUNKS = 8


class KnownRows:
    """Rows of a block table as they were in the last step, each as far as it is needed.

    Of some rows much less is needed than of others. So they are cut into chunks of rows that need about as much, each
    as wide as the one of it that needs most. Rows that come to need more go into one more chunk. A row that needs less
    stays where it is, and is compared in vain until all are cut anew.
    """

    def __init__(self) -> None:
        self._chunks: list[tuple[Int64, UInt32]] = []
        """Rows of the table, all different, and a copy of them."""
        self._kept = np.empty(0, np.int64)
        """[rows of the table]: leading blocks of the row that a chunk has."""
        self._shape = 0, 0
        """Of the table of the last step."""

    def changed(self, table: UInt32, need: Int64) -> Bools:
        """[len(need)]: which rows have changed within the first ``need`` blocks since the last call.

        ``table``: the block table of a step, of any shape; keeps what it has now.
        """
        changed = np.zeros(len(need), bool)
        if table.shape != self._shape:
            self._trim(*table.shape)
        for number, (rows, before) in enumerate(self._chunks):
            now = table[rows, : before.shape[1]]
            differs = now != before
            if differs.any():
                where = differs.any(axis=1).nonzero()[0]
                which = rows[where]
                changed[which] |= differs[where].argmax(axis=1) < need[which]
                self._chunks[number] = rows, now
        return changed

    def keep(self, table: UInt32, need: Int64) -> None:
        """Keeps the first ``need`` blocks of each row of the ``table`` that :meth:`changed` had last."""
        self._shape = table.shape
        self._kept = np.append(self._kept, np.zeros(len(need) - len(self._kept), np.int64))
        rows = (need > self._kept).nonzero()[0]
        if not len(rows):
            return
        chunks = [rows]
        if len(self._chunks) >= CHUNKS + MORE_CHUNKS or 2 * len(rows) > np.count_nonzero(need):
            chunks = _cut(need)
            self._chunks.clear()
            self._kept[:] = 0
        for some in chunks:
            width = int(need[some].max())
            self._chunks.append((some, table[some, :width]))
            self._kept[some] = width

    def _trim(self, height: int, width: int) -> None:
        """Forgets what a table of ``height`` rows and ``width`` columns does not have."""
        self._shape = height, width
        for number, (rows, before) in enumerate(self._chunks):
            if rows.max(initial=-1) >= height or before.shape[1] > width:
                here = rows < height
                self._chunks[number] = rows[here], before[here, :width]
        self._kept[height:] = 0
        np.minimum(self._kept, width, out=self._kept)


def _cut(need: Int64) -> list[Int64]:
    """Rows by how much they ``need``, those that need nothing left out; about as many in each chunk."""
    rows = need.argsort()[-np.count_nonzero(need) :]
    ascending = need[rows]
    widths = np.unique(ascending[np.arange(1, CHUNKS + 1) * len(rows) // CHUNKS - 1])
    chunks = np.split(rows, np.searchsorted(ascending, widths[:-1], side="right"))
    return [np.sort(chunk) for chunk in chunks]  # as they lie in memory
