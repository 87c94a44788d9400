"""Finds which requests of a step begin with the same blocks of the KV cache, by the numbers of the blocks alone.

A step mostly has the tree of the step before: to see that takes one comparison with what was shared then, and one of
the blocks by which branches part. Otherwise the requests are sorted anew, and what neighbours share gives the tree.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]
Int64 = NDArray[np.int64]

BLOCK_BITS = 32
#: More than any number of a block.
NO_BLOCK = 1 << BLOCK_BITS


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """Which requests of a step share which blocks; a request is a row of the step's block table.

    Nodes are in depth-first order, a parent before its children, with at least two requests each: leaves, which are
    single requests, are left out. Requests share block ``j`` where they have equal numbers in columns 0 to ``j``.
    """

    order: Int64
    """[requests]: all requests, so that those under a node lie side by side."""
    first: Int64
    """[nodes]: the node's requests are ``order[first:last]``."""
    last: Int64
    """[nodes]"""
    begin: Int64
    """[nodes], in blocks: where the parent's shared part ends, 0 at a root."""
    end: Int64
    """[nodes], in blocks, more than ``begin``: all requests of the node share blocks [0, ``end``), and not all of them
    have the same block ``end``."""
    parent: Int64
    """[nodes], -1 at a root."""


class PrefixFinder:
    """Finds the tree of each step; remembers the last one, which is mostly still right."""

    def __init__(self) -> None:
        self._last: _Found | None = None

    def find(self, block_table: Int32, blocks: Int64) -> PrefixTree:
        """The tree of a step.

        ``block_table``: int32 [requests, columns], with rows any distance apart; ``blocks`` [requests]: the leading
        blocks of each request that may be shared, at most ``columns``. What a row has after them is not looked at.

        Gives the object it gave for the step before where the same rows share the same blocks as then: what was
        decided by the tree alone still holds. It says nothing of the blocks that are not shared, nor of new tokens.
        """
        table = block_table.view(np.uint32)  # not negative, for sort keys
        if not table.shape[1]:
            table = np.zeros((len(table), 1), np.uint32)
        if self._last is None or not self._last.holds(table, blocks):
            self._last = _Found.of(*_sorted(table, blocks), table)
        return self._last.tree


@dataclass(frozen=True, eq=False)
class _Found:
    """A tree, and what has to stay as it is for the tree to hold.

    A branch is what continues after a node: another node or a single request. ``branch_*`` say it for all branches of
    all nodes and of the whole, which is counted as a node with no blocks.
    """

    tree: PrefixTree
    shared: Int64
    """[requests]: blocks shared with any other request."""
    is_shared: NDArray[np.bool_]
    """[requests, most blocks shared]"""
    table: UInt32
    """[requests, most blocks shared]: the block table when the tree was found."""
    branch_request: Int64
    """[branches]: one of the branch's requests."""
    branch_column: Int64
    """[branches]: where its node ends, and a block tells it from the other branches."""
    branch_key: Int64
    """[branches]: its node, above the bits of a block."""
    ended_key: Int64
    """[branches]: keys for branches that have no block there, all different."""

    @classmethod
    def of(cls, order: Int64, common: Int64, table: UInt32) -> _Found:
        """The tree of sorted requests; ``common`` [requests - 1]: blocks that neighbours in ``order`` share."""
        tree, owner = _tree(order, common)
        requests, nodes = len(order), len(tree.first)
        shared = np.zeros(requests, np.int64)
        shared[order[1:]] = common
        shared[order[:-1]] = np.maximum(shared[order[:-1]], common)
        most = int(common.max(initial=0))
        # A branch begins between each two neighbours, and one with the whole and each node.
        whole = np.zeros(min(requests, 1), np.int64)
        place = np.concatenate([np.arange(1, requests), whole, tree.first])
        node = np.concatenate([owner, whole - 1, np.arange(nodes)])
        return cls(
            tree,
            shared,
            np.arange(most) < shared[:, None],
            table[:, :most].copy(),
            order[place],
            np.concatenate([common, whole, tree.end]),
            (node + 1) << BLOCK_BITS,
            -1 - np.arange(len(place)),
        )

    def holds(self, table: UInt32, blocks: Int64) -> bool:
        """Whether this is the tree of another step."""
        if len(blocks) != len(self.shared) or (blocks < self.shared).any():
            return False
        changed = table[:, : self.table.shape[1]] != self.table
        changed &= self.is_shared
        if changed.any():
            return False
        # Who shares still does. Nobody shares more where all branches of a node go on with different blocks.
        block = table[self.branch_request, np.minimum(self.branch_column, table.shape[1] - 1)]
        goes_on = self.branch_column < blocks[self.branch_request]
        keys = np.where(goes_on, self.branch_key | block, self.ended_key)
        keys.sort()
        return not (keys[1:] == keys[:-1]).any()


def _sorted(table: UInt32, blocks: Int64) -> tuple[Int64, Int64]:
    """The requests so that those that share blocks lie side by side, and the blocks that neighbours share."""
    first_block = np.where(blocks > 0, table[:, 0], NO_BLOCK + np.arange(len(blocks)))
    order = first_block.argsort()
    first_block = first_block[order]
    if (first_block[1:] != first_block[:-1]).all():
        return order, np.zeros(len(order[1:]), np.int64)
    # As text of one byte a character, which Python sorts by memcmp.
    used = np.ascontiguousarray(table[:, : blocks.max()])
    text, row_bytes = str(used.data, "latin-1"), used.strides[0]
    begins, sizes = range(0, len(text), row_bytes), (used.itemsize * blocks).tolist()
    rows = [text[begin : begin + size] for begin, size in zip(begins, sizes, strict=True)]
    order = np.array(sorted(range(len(rows)), key=rows.__getitem__))
    used, blocks = used[order], blocks[order]
    differs = used[1:] != used[:-1]
    common = differs.argmax(axis=1)
    common[(common == 0) & ~differs[:, 0]] = used.shape[1]
    return order, np.minimum(common, np.minimum(blocks[1:], blocks[:-1]))


def _tree(order: Int64, common: Int64) -> tuple[PrefixTree, Int64]:
    """The tree of sorted requests, and [requests - 1]: the deepest node of both neighbours, -1 where they have none.

    A node is a longest run of neighbours that share more than those around it.
    """
    # Only where neighbours share more or less than those before them does a node begin or end.
    change = np.ones(len(common) + 1, bool)
    np.not_equal(common[1:], common[:-1], out=change[1:-1])
    places = change.nonzero()[0]
    firsts, lasts, ends, parents = [0], [0], [0], [0]  # the whole, then the nodes as they are met
    path, owners = [0], []
    for place, value in zip(places.tolist(), [*common[places[:-1]].tolist(), 0], strict=True):
        first = place
        while ends[path[-1]] > value:
            node = path.pop()
            first = firsts[node]
            lasts[node] = place + 1
            parents[node] = path[-1] if ends[path[-1]] >= value else len(ends)  # the node that is met now
        if ends[path[-1]] < value:
            path.append(len(ends))
            firsts.append(first)
            lasts.append(0)
            ends.append(value)
            parents.append(0)
        owners.append(path[-1])
    first_place, last, end, parent = np.array([firsts, lasts, ends, parents])
    depth_first = np.argsort(first_place * (end.max() + 1) + end)  # the whole comes first
    number = np.empty_like(depth_first)
    number[depth_first] = np.arange(-1, len(number) - 1)
    met = depth_first[1:]
    tree = PrefixTree(order, first_place[met], last[met], end[parent[met]], end[met], number[parent[met]])
    return tree, number[np.array(owners[:-1], np.int64).repeat(np.diff(places))]
