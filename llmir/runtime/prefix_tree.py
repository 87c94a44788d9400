"""The tree of requests that begin with the same blocks of the KV cache, from the requests in sorted order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmir.runtime.runs import Int64, in_order, starts


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Which requests of a step share which blocks.

    Nodes are in depth-first order, a parent before its children, with at least two requests each: leaves, which are
    single requests, are left out. Requests share block ``j`` where they have equal numbers in columns 0 to ``j``.
    """

    order: Int64
    """[requests]: all requests, so that those under a node lie side by side."""
    first: Int64
    """[nodes]: the node's requests are ``order[first:last]``."""
    last: Int64
    """[nodes]"""
    end: Int64
    """[nodes], in blocks, more than the parent's: all requests of the node share blocks [0, ``end``), and not all of
    them have the same block ``end``."""
    parent: Int64
    """[nodes], -1 at a root."""
    owner: Int64
    """[requests]: the deepest node of each request of ``order``, -1 where it shares nothing."""

    @classmethod
    def of(cls, order: Int64, common: Int64) -> PrefixTree:
        """The tree of sorted requests; ``common`` [requests - 1]: blocks that neighbours in ``order`` share.

        A node is a longest run of neighbours that share at least so many blocks.
        """
        if not common.any():
            none = np.empty(0, np.int64)
            return cls(order, none, none, none, none, np.full(len(order), -1))
        start = starts(common)
        padded = np.zeros(len(start), np.int64)  # the last one is for -1 and for the end: no run
        value = padded[:-1]
        value[:] = common[start[:-1]]
        before, after = _nearest_smaller(value)
        # Runs of one node have the same number and nothing smaller between them: the same last smaller one. In this
        # order a node comes after those around it.
        shares = value.nonzero()[0]
        key = (before[shares] + 1) * (value.max() + 1) + value[shares]
        by_key, key = in_order(key)
        by_key, of_node = shares[by_key], starts(key)
        node_of_run = np.full(len(padded), -1)
        node_of_run[by_key] = np.arange(len(of_node) - 1).repeat(of_node[1:] - of_node[:-1])
        met = by_key[of_node[:-1]]
        left, right, end = before[met], after[met], value[met]
        parent = node_of_run[np.where(padded[left] >= padded[right], left, right)]
        # A request's deepest node is that of the neighbour with which it shares more.
        run = np.full(len(order) + 1, -1)
        run[1:-1] = np.arange(len(start) - 1).repeat(start[1:] - start[:-1])
        run_before, run_after = run[:-1], run[1:]
        owner = node_of_run[np.where(padded[run_before] >= padded[run_after], run_before, run_after)]
        return cls(order, start[left + 1], start[right] + 1, end, parent, owner)


def _nearest_smaller(value: Int64) -> tuple[Int64, Int64]:
    """Of each number, which is not negative, the places of the last smaller one before it and of the first after it.

    -1 and their count where there is none.
    """
    # Both at once: the second half is looked through from the end. Least of the next 1, 2, 4, ... numbers; every place
    # steps over as many of them as are not smaller, the longest steps first.
    count, levels = len(value), len(value).bit_length()
    numbers = 2 * count + 1
    least = np.full((levels, numbers + (1 << levels)), -1)
    least[0, :count], least[0, count + 1 : numbers] = value, value[::-1]
    for level in range(1, levels):
        width = 1 << (level - 1)
        np.minimum(least[level - 1, :numbers], least[level - 1, width : width + numbers], out=least[level, :numbers])
    here = least[0, :numbers]
    place = np.arange(numbers)
    for level in reversed(range(levels)):
        place += (least[level].take(place) >= here) << level
    return numbers - 1 - place[count + 1 :][::-1], place[:count]
