"""Runs of numbers in arrays: what work lists are made of, whole arrays at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


def ranges(begin: Int64, end: Int64) -> Int64:
    """All numbers of each range, one range after the other."""
    counts = end - begin
    if (counts == 1).all():  # most often: requests that decode, one token each
        return begin.copy()
    after = counts.cumsum()
    return np.arange(int(after[-1])) + (begin - after + counts).repeat(counts)


def count_up(counts: Int64) -> Int64:
    """0, 1, 2 and so on up to each count."""
    return ranges(np.zeros_like(counts), counts)


def begins(numbers: Int64) -> NDArray[np.bool_]:
    """Whether each number is another than the one before it; true of the first one."""
    found = np.ones(len(numbers), bool)
    np.not_equal(numbers[1:], numbers[:-1], out=found[1:])
    return found
