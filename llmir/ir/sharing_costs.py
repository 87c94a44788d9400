"""When reading a part of the cache once for several requests pays: the arithmetic of passes and of every step.

A part of ``tokens`` keys and values lies under several requests, each with some query rows in the step (new tokens
times the query heads of a KV head). All times are nanoseconds of one thread for one KV head. A key that comes from
memory costs its reading and its products; one that comes from a cache costs whichever of them takes longer.

Many parts are asked about at once: ``tokens`` [parts], ``rows`` [requests], those of one part after those of another,
and ``requests`` [parts]: how many each part has, one at least. Without it there is one part.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from llmir.ir.kernel_spec import SharingCosts

Rows = NDArray[np.integer]
Tokens = int | NDArray[np.integer]
Times = NDArray[np.float64]


def cached_key(costs: SharingCosts, tokens: Tokens) -> Times:
    """One key and its value of a part of ``tokens`` that another request has just read.

    Linear in the tokens between two points of the curve, constant beyond its ends.
    """
    return np.asarray(np.interp(tokens, *_curve(costs.cached_key)))


@cache
def _curve(points: tuple[tuple[int, float], ...]) -> NDArray[np.float64]:
    return np.array(points, np.float64).T.copy()


def alone(costs: SharingCosts, tokens: Tokens, rows: Rows, row_tile: int, requests: Rows | None = None) -> Times:
    """Each request reads the part: one of them from memory, the others after it. [parts]

    Rows that fill no whole tile count as their part of one: that they would be padded is no reason to share.
    """
    requests, first = _parts(rows, requests)
    multiply = rows * np.where(rows <= costs.decode_rows, costs.decode_row_key, costs.tile_key / row_tile)
    cached = np.atleast_1d(cached_key(costs, tokens))
    most = np.maximum.reduceat(multiply, first)
    each = np.maximum(multiply, cached.repeat(requests))
    others = np.add.reduceat(each, first) - np.maximum(cached, most)
    return tokens * (costs.read_key + most + others)


def shared(costs: SharingCosts, tokens: Tokens, rows: Rows, row_tile: int, requests: Rows | None = None) -> Times:
    """The part is read once for the rows of all requests, which then leave and merge a state each. [parts]"""
    count = np.add.reduceat(rows, _parts(rows, requests)[1])
    return tokens * (costs.read_key + -(-count // row_tile) * costs.tile_key) + count * costs.row


def pays(
    costs: SharingCosts, tokens: Tokens, rows: Rows, row_tile: int, requests: Rows | None = None
) -> NDArray[np.bool_]:
    """Whether a part should be read once for its requests. [parts]"""
    requests, _ = _parts(rows, requests)
    facts = costs, tokens, rows, row_tile, requests
    return (shared(*facts) <= costs.margin * alone(*facts)) & (tokens >= costs.least_tokens) & (requests > 1)


def _parts(rows: Rows, requests: Rows | None) -> tuple[Rows, Rows]:
    """Of each part, how many requests it has, and where they begin."""
    if requests is None:
        return np.array([len(rows)]), np.zeros(1, np.int64)
    return requests, requests.cumsum() - requests
