"""Finds which requests of a step begin with the same blocks of the KV cache, by the numbers of the blocks alone.

Only the tree's edges are looked at, never the tokens. A step mostly has the tree of the step before, and to see that
takes one comparison with what was shared then. Otherwise the requests are sorted anew, all branches at once: in each
set that is known to share its beginning, one request leads, and the others are told apart by how far they go with it
and by the block with which they leave it; those that leave together are a set of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
UInt32 = NDArray[np.uint32]
Int64 = NDArray[np.int64]

#: Blocks of a row that are compared at a time, to begin with; doubled while rows stay equal.
COMPARED_BLOCKS = 128
#: A block's number in the low half of a sort key.
BLOCK_BITS = 32


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

        Gives the object it gave for the step before where the same rows share the same numbers of blocks as then,
        whichever blocks these are: what was decided by the tree alone still holds. Only a reader may have it.
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
        tree = _tree(order, common)
        requests, nodes = len(order), len(tree.first)
        # The whole is node 0 here. Nodes are painted over their parents.
        node = np.zeros(len(common), np.int64)
        for number, first, last in zip(range(1, nodes + 1), tree.first.tolist(), tree.last.tolist(), strict=True):
            node[first : last - 1] = number
        padded = np.concatenate([[0], common, [0]])
        shared = np.empty(requests, np.int64)
        shared[order] = np.maximum(padded[:-1], padded[1:])[:requests]
        most = int(common.max(initial=0))
        # A branch begins between each two neighbours, and one with the whole and each node.
        whole = np.zeros(min(requests, 1), np.int64)
        place = np.concatenate([np.arange(1, requests), whole, tree.first])
        column = np.concatenate([common, whole, tree.end])
        owner = np.concatenate([node, whole, np.arange(1, nodes + 1)])
        return cls(
            tree,
            shared,
            np.arange(most) < shared[:, None],
            table[:, :most].copy(),
            order[place],
            column,
            owner << BLOCK_BITS,
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
    key = np.where(blocks > 0, table[:, 0], (1 << BLOCK_BITS) + np.arange(len(blocks)))
    order = np.argsort(key)
    key = key[order]
    common = np.zeros(max(len(order) - 1, 0), np.int64)
    together = key[1:] == key[:-1]  # neighbours of one set
    while together.any():
        in_set = np.zeros(len(order), bool)
        in_set[1:] = together
        is_first = ~in_set
        in_set[:-1] |= together
        place = np.flatnonzero(in_set)
        request = order[place]
        first = np.flatnonzero(is_first[place])
        size = np.diff(first, append=len(place))
        number = np.repeat(np.arange(len(first)), size)
        # The middle one leads: the first would be a bad choice for requests that come sorted by what they share.
        leader = request[first + size // 2][number]
        count = blocks[request]
        with_leader = _common(table, request, leader, np.minimum(count, blocks[leader]))
        ended = with_leader == count
        block = table[request, np.minimum(with_leader, table.shape[1] - 1)]
        # By set, then the longest way with the leader first, then the block after it, if there is one.
        ranks = 2 * (table.shape[1] + 1)
        rank = 2 * (table.shape[1] - with_leader) + ended
        key = (number * ranks + rank << BLOCK_BITS) + np.where(ended, np.arange(len(place)), block)
        by_key = np.argsort(key)
        order[place] = request[by_key]
        key, with_leader = key[by_key], with_leader[by_key]
        # Pairs of neighbours inside a set: those of two kinds part where the first of them leaves the leader.
        pair = np.flatnonzero(number[1:] == number[:-1])
        common[place[pair]] = np.minimum(with_leader[pair], with_leader[pair + 1])
        together[place[pair]] = key[pair] == key[pair + 1]
    return order, common


def _common(table: UInt32, request: Int64, leader: Int64, most: Int64) -> Int64:
    """[pairs]: how many leading blocks the two have in common, at most ``most``, which is not 0."""
    common = most.copy()
    begin, width = 0, COMPARED_BLOCKS
    open_pairs = np.arange(len(request))
    while len(open_pairs):
        part = table[:, begin : begin + width]
        differs = part[request[open_pairs]] != part[leader[open_pairs]]
        first = differs.argmax(axis=1)
        differ = differs[np.arange(len(first)), first]
        parted = open_pairs[differ]
        common[parted] = np.minimum(most[parted], begin + first[differ])
        begin, width = begin + width, 2 * width
        open_pairs = open_pairs[~differ & (most[open_pairs] > begin)]
    return common


def _tree(order: Int64, common: Int64) -> PrefixTree:
    """The tree of sorted requests: a node for each longest run of pairs that share more than the pairs around it."""
    # Only where a pair shares more or less than the one before does a node begin or end.
    changes = np.flatnonzero(np.diff(common, prepend=0, append=0))
    values = np.append(common, 0)[changes]
    nodes: list[tuple[int, int, int, int]] = []
    unfinished = [(0, 0)]  # (end, first), each within the one before it
    for place, value in zip(changes.tolist(), values.tolist(), strict=True):
        first = place
        while unfinished[-1][0] > value:
            end, first = unfinished.pop()
            nodes.append((first, end, place + 1, max(value, unfinished[-1][0])))
        if unfinished[-1][0] < value:
            unfinished.append((value, first))
    nodes.sort()
    parents = []
    path = [(-1, 0)]  # (node, end), from the root
    for number, (_, end, _, begin) in enumerate(nodes):
        while path[-1][1] > begin:
            path.pop()
        parents.append(path[-1][0])
        path.append((number, end))
    columns = np.array(nodes, np.int64).reshape(-1, 4).T
    return PrefixTree(order, columns[0], columns[2], columns[3], columns[1], np.array(parents, np.int64))
