"""Runs of numbers in arrays: what work lists are made of, whole arrays at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt32 = NDArray[np.uint32]


def ranges(begin: Int64, end: Int64) -> Int64:
    """All numbers of each range, one range after the other."""
    counts = end - begin
    if (counts == 1).all():  # most often: requests that decode, one token each
        return begin.copy()
    after = counts.cumsum()
    return np.arange(int(after[-1])) + (begin - after + counts).repeat(counts)


def count_up(counts: Int64) -> Int64:
    """0, 1, 2 and so on, as many numbers as each count says."""
    after = counts.cumsum()
    total = int(after[-1]) if len(after) else 0
    return np.arange(total) - (after - counts).repeat(counts)


def starts(numbers: Int64) -> Int64:
    """Where each run of equal numbers begins, and then where the last one ends."""
    found = np.ones(len(numbers) + 1, bool)
    np.not_equal(numbers[1:], numbers[:-1], out=found[1:-1])
    return found.nonzero()[0]


def in_order(numbers: Int64) -> tuple[Int64, Int64]:
    """Places so that what is there ascends, equal ones as they come; and the numbers in that order.

    For numbers from 0 to 2^40: number and place are sorted as one, which takes a third of an argsort.
    """
    bits = len(numbers).bit_length()
    both = numbers << bits
    both |= np.arange(len(numbers))
    both.sort()
    return both & ((1 << bits) - 1), both >> bits
