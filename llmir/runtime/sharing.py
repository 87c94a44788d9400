"""Which parts of a step's caches are read once for several requests, and the work items that do it.

A node of the prefix tree may be read once for everybody under it; or be left to its children, each of which then reads
it together with its own part; or, where a request is alone below it, be read with the rest of the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmir.costs.sharing import Readers
from llmir.ir.kernel_spec import SharingCosts
from llmir.kernels.work_list import ITEM_FIELDS, Item
from llmir.runtime.prefix_tree import PrefixTree
from llmir.runtime.runs import Int32, Int64, count_up, ranges


@dataclass(frozen=True)
class SharedParts:
    """Ranges of keys that are read once; those of a request come in the order of their keys."""

    begin: Int64
    """[parts]"""
    end: Int64
    """[parts]"""
    counts: Int64
    """[parts]: how many requests share it, two at least."""
    requests: Int64
    """Who they are: the requests of one part after those of another."""
    windowed: bool
    """Whether a request may have keys before its first part."""


@dataclass(frozen=True)
class Shared:
    """What becomes of a step's tiles where parts of their keys are read once."""

    tiles: Int32
    """[tiles, ITEM_FIELDS]; the STATE of a tile whose tokens have other parts too is 0."""
    tokens: Int64
    """The gathered tokens, which MEMBERS counts."""
    requests: int
    """Requests that share anything."""
    keys_not_read: int
    """Keys, of every KV head, that are not read once more for each request."""


def shared_parts(
    tree: PrefixTree, rows: Int64, first_keys: Int64 | None, block_size: int, row_tile: int, costs: SharingCosts
) -> SharedParts:
    """The parts of ``tree`` that are read once.

    ``rows`` [requests]: query rows of a KV head; ``first_keys`` [requests]: the first key that all tokens of a request
    may see, where there is a window.
    """
    nodes = len(tree.first)
    reader_rows, node = _readers(tree, rows[tree.order])
    readers = Readers(costs, reader_rows, row_tile, node, nodes)
    begin, end = np.zeros(nodes, np.int64), tree.end * block_size  # of the keys of each node that are not read yet
    if first_keys is not None:
        seen_by_all = np.maximum.reduceat(np.append(first_keys[tree.order], 0), np.ravel([tree.first, tree.last], "F"))
        begin = -(-seen_by_all[::2] // block_size) * block_size
    # Of all nodes that are undecided, those that pay and have none such above them are read once. It leaves the nodes
    # below them, whose keys then begin later.
    least_tokens = max(costs.least_tokens, 1)
    undecided, read = end - begin >= least_tokens, np.zeros(nodes, bool)
    while undecided.any():
        found = (undecided & readers.share(end - begin)).nonzero()[0]
        first, last = tree.first[found], tree.last[found]
        top = np.ones(len(found), bool)
        np.greater_equal(first[1:], np.maximum.accumulate(last[:-1]), out=top[1:])
        found = found[top]
        read[found] = True
        after = np.searchsorted(tree.first, last[top])  # the nodes under a node follow it up to this one
        below = ranges(found + 1, after)
        begin[below] = np.maximum(begin[below], end[found].repeat(after - found - 1))
        undecided[:] = False
        undecided[below] = end[below] - begin[below] >= least_tokens
    parts = read.nonzero()[0]
    first, last = tree.first[parts], tree.last[parts]
    requests = tree.order[ranges(first, last)]
    return SharedParts(begin[parts], end[parts], last - first, requests, first_keys is not None)


def _readers(tree: PrefixTree, rows: Int64) -> tuple[Int64, Int64]:
    """Who would read a node's part each by itself: its children, and the requests directly under it.

    Their query rows, and the node of each. ``rows`` [requests]: of the tree's requests in order.
    """
    up_to = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows, out=up_to[1:])
    node = np.concatenate([tree.parent, tree.owner])
    under = (node >= 0).nonzero()[0]
    return np.concatenate([up_to[tree.last] - up_to[tree.first], rows])[under], node[under]


def share(tiles: Int32, parts: SharedParts, query_start: Int64, variant: int, max_tokens: int) -> Shared:
    """Takes the keys of ``parts`` out of the tiles of those who share them, and adds tiles that read them once.

    ``tiles`` [tiles, ITEM_FIELDS], ascending by request, are written in place; ``query_start`` [requests + 1]; the
    tiles that are added are of ``variant`` and have up to ``max_tokens`` tokens.
    """
    # The parts of a request follow one another without a gap, and then its own tiles follow.
    read_to = np.zeros(len(query_start) - 1, np.int64)
    np.maximum.at(read_to, parts.requests, parts.end.repeat(parts.counts))
    of_request = tiles[:, Item.REQUEST]
    sharing = read_to[of_request].nonzero()[0]
    request = of_request[sharing]
    tiles[sharing, Item.STATE] = 0
    before = _before(tiles[sharing], parts, read_to) if parts.windowed else tiles[:0]
    tiles[sharing, Item.KEY_BEGIN] = read_to[request]

    begin, end = query_start[parts.requests], query_start[parts.requests + 1]
    first = parts.counts.cumsum() - parts.counts
    tokens = np.add.reduceat(end - begin, first)
    once = _gathered(parts, parts.requests[first], tokens, variant, max_tokens)
    saved = (parts.counts - -(-tokens // max_tokens)) @ (parts.end - parts.begin)
    tiles = np.concatenate([tiles, before, once])
    return Shared(tiles, ranges(begin, end), int(np.count_nonzero(read_to)), int(saved))


def _before(tiles: Int32, parts: SharedParts, read_to: Int64) -> Int32:
    """What ``tiles`` read before the first part of their request: keys that not all who share it see.

    ``read_to`` [requests]: where the last part ends.
    """
    read_from = read_to.copy()
    np.minimum.at(read_from, parts.requests, parts.begin.repeat(parts.counts))
    tiles[:, Item.KEY_END] = read_from[tiles[:, Item.REQUEST]]
    return tiles[tiles[:, Item.KEY_BEGIN] < tiles[:, Item.KEY_END]]


def _gathered(parts: SharedParts, requests: Int64, tokens: Int64, variant: int, max_tokens: int) -> Int32:
    """Tiles that read the parts, each part's with about equally many of its ``tokens`` [parts].

    ``requests`` [parts]: one of each, whose row of the block table has it.
    """
    count = -(-tokens // max_tokens)
    part = np.arange(len(count)).repeat(count)
    number, count, of_part = count_up(count), count[part], tokens[part]
    first, last = of_part * number // count, of_part * (number + 1) // count
    end = parts.end[part]
    tiles = np.zeros((len(part), ITEM_FIELDS), np.int32)
    tiles[:, Item.VARIANT] = variant
    tiles[:, Item.TOKENS] = last - first
    tiles[:, Item.REQUEST] = requests[part]
    tiles[:, Item.POSITION] = end - 1
    tiles[:, Item.KEY_BEGIN] = parts.begin[part]
    tiles[:, Item.KEY_END] = end
    tiles[:, Item.MEMBERS] = (tokens.cumsum() - tokens)[part] + first
    return tiles
