"""When reading a part of the cache once for several requests pays: the arithmetic of passes and of every step.

A part of ``tokens`` keys and values lies under several requests, each with some query rows in the step (new tokens
times the query heads of a KV head). All times are nanoseconds of one thread for one KV head. A key that comes from
memory costs its reading and its products; one that comes from a cache costs whichever of them takes longer.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmir.ir.kernel_spec import SharingCosts

Rows = NDArray[np.integer]
Tokens = int | NDArray[np.integer]
Parts = NDArray[np.int64]
Times = NDArray[np.float64]


def cached_key(costs: SharingCosts, tokens: Tokens) -> Times:
    """One key and its value of a part of ``tokens`` that another request has just read.

    Linear in the tokens between two points of the curve, constant beyond its ends.
    """
    return np.asarray(np.interp(tokens, *_curve(costs.cached_key)))


@cache
def _curve(points: tuple[tuple[int, float], ...]) -> NDArray[np.float64]:
    return np.array(points, np.float64).T.copy()


class Readers:
    """Who would read some parts, each by itself, and what that costs; ``tokens`` [parts], or one number for all."""

    def __init__(self, costs: SharingCosts, rows: Rows, row_tile: int, part: Parts | None = None, parts: int = 1):
        """``rows`` [readers]: the query rows of each; ``part`` [readers]: its part, None: there is one."""
        self._costs = costs
        self._part = np.zeros(len(rows), np.int64) if part is None else part
        self._count = np.bincount(self._part, minlength=parts)
        self._rows = np.bincount(self._part, rows, parts)
        self._tiles = np.ceil(self._rows / row_tile)
        # Rows that fill no whole tile count as their part of one: that they would be padded is no reason to share.
        row_key = np.where(rows <= costs.decode_rows, costs.decode_row_key, costs.tile_key / row_tile)
        self._multiply = rows * row_key
        self._most = np.zeros(parts)
        np.maximum.at(self._most, self._part, self._multiply)

    def alone(self, tokens: Tokens) -> Times:
        """Each reads the part: one of them from memory, the others after it. [parts]"""
        cached = np.atleast_1d(cached_key(self._costs, tokens))
        each = np.maximum(self._multiply, cached[self._part])
        others = np.bincount(self._part, each, len(self._most)) - np.maximum(cached, self._most)
        return tokens * (self._costs.read_key + self._most + others)

    def shared(self, tokens: Tokens) -> Times:
        """The part is read once for the rows of all of them, which then leave and merge a state each. [parts]"""
        return tokens * (self._costs.read_key + self._tiles * self._costs.tile_key) + self._rows * self._costs.row

    def share(self, tokens: Tokens) -> NDArray[np.bool_]:
        """Whether a part should be read once: it then costs less, by a margin. [parts]"""
        pays = self.shared(tokens) <= self._costs.margin * self.alone(tokens)
        return pays & (tokens >= self._costs.least_tokens) & (self._count > 1)
