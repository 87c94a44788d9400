"""Which requests of a decode step share blocks, known on the host although SGLang's block table is on the device.

The device's table of a step is copied in the background, once for each set of requests, and is used in the steps after
the copy has come; nothing ever waits for it. That it is old by then does no harm: requests whose rows had equal
beginnings at one moment have the same tokens there, and keep them as long as they live, whatever becomes of the blocks'
numbers. So a table is of one moment, and rows of two are never compared. A request whose prompt is (again) being
processed is forgotten, because only then may another get its id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

#: A table is copied again after so many steps: SGLang replaces equal blocks by one another when a prompt is done, one
#: step or more after its first token.
REFRESH_STEPS = 32
#: Blocks that requests may grow by before their table is made anew.
ROOM = 8


@dataclass(frozen=True)
class _Moment:
    """A block table as it once was."""

    row: dict[str, int]
    """The row of each request, by its id."""
    blocks: Int64
    """[requests]: whole blocks of each, the last of its table that may be compared."""
    table: torch.Tensor
    """int32 [requests, columns], in host memory."""
    arrived: Any
    """An event after the copy, None where the table is the host's own."""


class HostTable:
    """Block tables on the host, for sharing alone: the numbers in them are no longer, or never were, blocks."""

    def __init__(self, block_size: int):
        self._block_size = block_size
        self._known: _Moment | None = None
        self._coming: _Moment | None = None
        self._steps = 0
        self._answer: tuple[_Moment, tuple[str, ...], int, Int32] | None = None

    def forget(self, requests: Sequence[str] | None) -> None:
        """These requests' prompts are being processed; None: nobody knows whose."""
        for moment in (self._known, self._coming):
            if moment is not None:
                for request in list(moment.row) if requests is None else requests:
                    moment.row.pop(request, None)
        self._answer = None

    def of(self, requests: Sequence[str], lengths: Int32) -> Int32 | None:
        """A block table of a step in which each of ``requests`` decodes; None where nothing is known of two of them.

        ``lengths`` [rows] in tokens, of the requests and then of padding. The result, int32 [rows, columns], has equal
        numbers where requests are known to share, and numbers of their own elsewhere.
        """
        self._receive()
        known, asked = self._known, tuple(requests)
        if known is None:
            return None
        columns = -(-int(lengths.max()) // self._block_size)
        if self._answer is not None:
            moment, of_whom, count, table = self._answer
            if moment is known and of_whom == asked and count == len(lengths) and table.shape[1] >= columns:
                return table
        rows = [known.row.get(request, -1) for request in requests]
        if sum(row >= 0 for row in rows) < 2 or len(set(requests)) < len(requests):
            return None
        table = _alone(len(lengths), columns + ROOM)
        seen = known.table.numpy()
        for place, row in enumerate(rows):
            if row >= 0:
                blocks = known.blocks[row]
                table[place, :blocks] = seen[row, :blocks]
        self._answer = (known, asked, len(lengths), table)
        return table

    def follow(self, requests: Sequence[str], lengths: Int32, table: torch.Tensor) -> None:
        """See the device's table of a step, int32 [requests, columns], of the requests alone; starts a copy if due."""
        self._steps += 1
        if self._coming is not None or len(requests) < 2:
            return
        known = self._known
        due = known is None or self._steps >= REFRESH_STEPS or any(request not in known.row for request in requests)
        if not due or len(set(requests)) < len(requests):
            return
        self._steps = 0
        on_device = table.device.type != "cpu"
        copy = torch.empty(table.shape, dtype=table.dtype, pin_memory=on_device)
        copy.copy_(table, non_blocking=True)
        arrived = None
        if on_device:
            arrived = torch.cuda.Event()
            arrived.record()
        blocks = lengths[: len(requests)].astype(np.int64) // self._block_size
        self._coming = _Moment({request: row for row, request in enumerate(requests)}, blocks, copy, arrived)

    def _receive(self) -> None:
        """Take a copy that has come; never wait for it."""
        if self._coming is not None and (self._coming.arrived is None or self._coming.arrived.query()):
            self._known, self._coming = self._coming, None


def _alone(rows: int, columns: int) -> Int32:
    """A table in which no two rows have an equal number: those below zero are no block's."""
    return np.repeat(-1 - np.arange(rows, dtype=np.int32)[:, None], columns, axis=1)
