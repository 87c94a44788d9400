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
#: A sort key's low half is a block's number; or, with the bit above set, a number of its own where no block is left.
BLOCK_BITS = 32
NO_BLOCK = 1 << BLOCK_BITS
LEVEL_BITS = BLOCK_BITS + 1


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
            self._last = _Search(table, blocks).found()
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


class _Search:
    """Finds the tree of a step from nothing.

    Works on sets of at least two requests that are known to share their beginning, all sets at once. The requests of
    a set keep their places in the order: those that belong together come to lie side by side within them.
    """

    def __init__(self, table: UInt32, blocks: Int64):
        self._table, self._blocks = table, blocks
        self._numbers = np.arange(len(table))
        self._shared = np.zeros(len(table), np.int64)
        self._nodes: list[tuple[Int64, Int64, Int64, Int64]] = []  # first, last, end, parent; numbered from 1
        self._node_count = 0
        key = np.where(blocks > 0, table[:, 0], NO_BLOCK + self._numbers)
        self._order = key.argsort()
        heads = _heads(key[self._order])
        whole = np.zeros(len(heads), np.int64)
        self._branches = [(self._order[heads], whole, whole)]  # request, column, node
        place = self._numbers
        while True:
            # Every head begins a run of requests that share more than was looked at; a run of one is done.
            size = np.diff(heads, append=len(place))
            is_set = size > 1
            if not is_set.any():
                break
            place = place[is_set.repeat(size)]
            heads = self._part(place, size[is_set], self._branches[-1][2][: len(size)][is_set])

    def _part(self, place: Int64, size: Int64, above: Int64) -> Int64:
        """Parts sets of ``size`` [sets] at ``place`` [their requests], branches of nodes ``above`` [sets].

        Gives the first of each run of requests that stay together, as a number in ``place``.
        """
        request, columns = self._order[place], self._table.shape[1]
        start = size.cumsum() - size
        number = self._numbers[: len(size)].repeat(size)
        # The middle one leads: the first would be a bad choice for requests that come sorted by what they share.
        leader = request[start + size // 2][number]
        count = self._blocks[request]
        common = _common(self._table, request, leader, np.minimum(count, self._blocks[leader]))
        block = self._table[request, np.minimum(common, columns - 1)]
        # By set, then the longest way with the leader first, then the block after it, if there is one.
        level = number * (columns + 1) + columns - common
        key = (level << LEVEL_BITS) + np.where(common == count, NO_BLOCK + self._numbers[: len(place)], block)
        by_key = key.argsort()
        self._order[place] = request = request[by_key]
        key = key[by_key]
        level = key >> LEVEL_BITS
        # Nobody goes further with the leader than the second does, and if it is the leader, than the one after it.
        level[start] = level[start + 1]

        # Each level of a set is a node, within the next level's.
        level_head = _heads(level)
        in_set = number[level_head]
        members = np.diff(level_head, append=len(place))
        end = columns - level[level_head] % (columns + 1)
        node = self._node_count + 1 + np.arange(len(level_head))
        is_outer = np.zeros(len(node), bool)
        is_outer[1:] = in_set[1:] == in_set[:-1]
        parent = node + 1
        parent[start_of_next(is_outer)] = above
        self._nodes.append((place[start[in_set]], place[level_head + members - 1] + 1, end, parent))
        self._node_count += len(node)

        local = self._numbers[: len(node)].repeat(members)
        self._shared[request] = end[local]
        heads = _heads(key)
        branch = local[heads]
        # What is within a node is one of its branches.
        self._branches.append(
            (
                np.concatenate([request[heads], request[start[in_set[is_outer]]]]),
                np.concatenate([end[branch], end[is_outer]]),
                np.concatenate([node[branch], node[is_outer]]),
            )
        )
        return heads

    def found(self) -> _Found:
        """The tree, and how to see whether it still holds."""
        request, column, node = (np.concatenate(arrays) for arrays in zip(*self._branches, strict=True))
        most = int(self._shared.max(initial=0))
        return _Found(
            self._tree(),
            self._shared,
            np.arange(most) < self._shared[:, None],
            self._table[:, :most].copy(),
            request,
            column,
            node << BLOCK_BITS,
            -1 - np.arange(len(node)),
        )

    def _tree(self) -> PrefixTree:
        if not self._nodes:
            none = np.empty(0, np.int64)
            return PrefixTree(self._order, none, none, none, none, none)
        first, last, end, parent = (np.concatenate(arrays) for arrays in zip(*self._nodes, strict=True))
        begin = np.append(0, end)[parent]
        depth_first = (first * (self._table.shape[1] + 1) + end).argsort()
        number = np.full(len(first) + 1, -1)
        number[depth_first + 1] = np.arange(len(first))
        f = depth_first
        return PrefixTree(self._order, first[f], last[f], begin[f], end[f], number[parent[f]])


def start_of_next(is_outer):
    last = np.ones(len(is_outer), bool)
    last[:-1] = ~is_outer[1:]
    return last


def _heads(values: Int64) -> Int64:
    """Where runs of equal values begin."""
    is_head = np.ones(len(values), bool)
    is_head[1:] = values[1:] != values[:-1]
    return is_head.nonzero()[0]


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
