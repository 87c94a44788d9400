"""Which pages SGLang's requests have, on a CPU: kept up with what SGLang writes, so that a step asks what is new alone.

SGLang keeps a slot for every token of every request in one tensor (``ReqToTokenPool.req_to_token``), and a page's slots
follow one another, so its first one tells its number. Its ``write`` says where that tensor changes; the tensor's own
version counter says when somebody has written past it, and then everything is read again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmir.errors import LlmirError
from llmir.runtime.runs import Int32, Int64, ranges


class PageTable:
    """The block table of all requests: a row each, as in ``req_to_token``."""

    def __init__(self, pool: Any, page_size: int):
        """``pool``: SGLang's ReqToTokenPool, of whose ``write`` this is told from now on."""
        self._pool = pool
        self._slots: torch.Tensor = pool.req_to_token
        if self._slots.is_inference():
            raise LlmirError("SGLang's req_to_token counts no versions, by which llmir sees who writes it")
        self._page_size = page_size
        slots = self._slots.numpy()
        rows, tokens = slots.shape
        self.pages: Int32 = slots if page_size == 1 else np.zeros((rows, -(-tokens // page_size)), np.int32)
        """[rows, columns]: the pages of each request, as far as :meth:`update` was told that it has tokens."""
        self._known = np.zeros(rows, np.int64)
        """Leading tokens of each row that ``pages`` is right for."""
        self._written = np.zeros(rows, np.int64)
        """The first token of each row that may have been written since the last update."""
        self._write = pool.write
        self._version = self._slots._version
        pool.write = self._write_and_note

    def update(self, rows: Int64, lengths: Int32) -> Int64:
        """Takes in what is new of the requests in ``rows``, of ``lengths`` tokens; gives :attr:`Step.unchanged`."""
        self._check_version()
        if self._page_size > 1:
            known = self._known[rows]
            begin = -(-known // self._page_size)
            end = np.maximum(-(-lengths.astype(np.int64) // self._page_size), begin)
            row, page = rows.repeat(end - begin), ranges(begin, end)
            self.pages[row, page] = self._slots.numpy()[row, page * self._page_size] // self._page_size
            self._known[rows] = np.maximum(known, lengths)
        unchanged = self._written // self._page_size
        self._written[:] = self._slots.shape[1]
        return unchanged

    def _write_and_note(self, indices: Any, values: Any) -> None:
        self._check_version()
        self._write(indices, values)
        self._version = self._slots._version
        row, first = _first_written(indices)
        for noted in (self._known, self._written):
            np.minimum.at(noted, row, first)

    def _check_version(self) -> None:
        """Forget everything where somebody has written without saying so."""
        if self._pool.req_to_token is not self._slots:
            raise LlmirError("SGLang has another req_to_token than when llmir began to follow it")
        if self._slots._version != self._version:
            self._version = self._slots._version
            self._known[:] = self._written[:] = 0


def _first_written(indices: Any) -> tuple[Any, Any]:
    """Rows, and the first token of each, that are written at ``indices``; all of them where that is not plain."""
    match indices:
        case (int() as row, slice() as tokens) if tokens.step is None and (tokens.start or 0) >= 0:
            return row, tokens.start or 0
        case (torch.Tensor() as row, torch.Tensor() as token) if _are_numbers(row) and _are_numbers(token):
            return row.numpy(), token.numpy()
    return slice(None), 0


def _are_numbers(index: torch.Tensor) -> bool:
    """Whether an index is a list of numbers, not a mask or a table of them."""
    return index.dtype in (torch.int64, torch.int32) and index.dim() == 1
