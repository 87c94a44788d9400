"""When reading a part of the cache once for several requests pays: the arithmetic of passes and of every step.

A part of ``tokens`` keys and values lies under several requests, each with some query rows in the step (new tokens
times the query heads of a KV head). All times are nanoseconds of one thread for one KV head. A key that comes from
memory costs its reading and its products; one that comes from a cache costs whichever of them takes longer.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from llmir.ir.signature import SharingCosts

Rows = NDArray[np.integer]


def cached_key(costs: SharingCosts, tokens: int) -> float:
    """One key and its value of a part of ``tokens`` that another request has just read.

    Linear in the tokens between two points of the curve, constant beyond its ends.
    """
    points = costs.cached_key
    upper = bisect_left(points, (tokens,))
    if upper in (0, len(points)):
        return points[min(upper, len(points) - 1)][1]
    (low, low_time), (high, high_time) = points[upper - 1], points[upper]
    return low_time + (high_time - low_time) * (tokens - low) / (high - low)


def alone(costs: SharingCosts, tokens: int, rows: Rows, row_tile: int) -> float:
    """Each request reads the part: one of them from memory, the others after it.

    ``rows`` [requests] int, at least one request. Rows that fill no whole tile count as their part of one: that they
    would be padded is no reason to share.
    """
    multiply = rows * np.where(rows <= costs.decode_rows, costs.decode_row_key, costs.tile_key / row_tile)
    most = float(multiply.max())
    cached = cached_key(costs, tokens)
    others = float(np.maximum(multiply, cached).sum()) - max(cached, most)
    return tokens * (costs.read_key + most + others)


def shared(costs: SharingCosts, tokens: int, rows: Rows, row_tile: int) -> float:
    """The part is read once for the rows of all requests, which then leave and merge a state each; as :func:`alone`."""
    count = int(rows.sum())
    return tokens * (costs.read_key + -(-count // row_tile) * costs.tile_key) + count * costs.row


def pays(costs: SharingCosts, tokens: int, rows: Rows, row_tile: int) -> bool:
    """Whether a part of ``tokens`` should be read once for the requests whose rows are ``rows`` [requests]."""
    if tokens < costs.least_tokens or len(rows) < 2:
        return False
    return shared(costs, tokens, rows, row_tile) <= costs.margin * alone(costs, tokens, rows, row_tile)
