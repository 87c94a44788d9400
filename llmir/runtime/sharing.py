"""Which parts of a step's caches are read once for several requests, and the work items that do it.

A node of the prefix tree may be read once for everybody under it; or be left to its children, each of which then reads
it together with its own part; or, where a request is alone below it, be read with the rest of the request.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmir.ir.kernel_spec import SharingCosts
from llmir.ir.sharing_costs import pays
from llmir.kernels.work_list import ITEM_FIELDS, Item
from llmir.runtime.prefix_tree import PrefixTree
from llmir.runtime.runs import Int64, count_up, in_order, ranges, starts


@dataclass(frozen=True)
class SharedParts:
    """Ranges of keys that are read once; those of a request come in the order of their keys."""

    begin: Int64
    """[parts]"""
    end: Int64
    """[parts]"""
    requests: Int64
    """Who shares: the requests of one part after those of another."""
    part: Int64
    """[requests]: the part that each of them is listed for."""


@dataclass(frozen=True)
class Shared:
    """What becomes of a step's tiles where parts of their keys are read once."""

    tiles: Int64
    """[tiles, ITEM_FIELDS]; the STATE of a tile whose tokens have other parts too is 0."""
    tokens: Int64
    """The gathered tokens, which MEMBERS counts."""
    requests: int
    """Requests that share anything."""
    keys_not_read: int
    """Keys, of every KV head, that are not read once more for each request."""


def shared_parts(
    tree: PrefixTree, rows: Int64, first_keys: Int64, block_size: int, row_tile: int, costs: SharingCosts
) -> SharedParts:
    """The parts of ``tree`` that are read once.

    ``rows`` [requests]: query rows of a KV head; ``first_keys`` [requests]: the first key that all tokens of a request
    may see (its window), 0 where there is none.
    """
    units, first_unit = _units(tree, rows[tree.order])
    begin = np.zeros(len(tree.first), np.int64)  # from where the keys of a node are not read yet
    if first_keys.any():
        seen_by_all = np.maximum.reduceat(np.append(first_keys[tree.order], 0), np.ravel([tree.first, tree.last], "F"))
        begin = -(-seen_by_all[::2] // block_size) * block_size
    # Of all nodes that are undecided, those that pay and have none such above them are read once. It leaves the nodes
    # below them, whose keys then begin later.
    undecided, read = np.arange(len(begin)), []
    while len(undecided):
        tokens = tree.end[undecided] * block_size - begin[undecided]
        first, last = first_unit[undecided], first_unit[undecided + 1]
        paying = pays(costs, tokens, units[ranges(first, last)], row_tile, last - first) & (tokens > 0)
        found = undecided[paying]
        under_earlier = np.append(0, np.maximum.accumulate(tree.below[found]))[:-1]  # all nodes before this one
        found = found[found >= under_earlier]
        read.append(found)
        undecided = ranges(found + 1, tree.below[found])
        above = (tree.end[found] * block_size).repeat(tree.below[found] - found - 1)
        begin[undecided] = np.maximum(begin[undecided], above)
    nodes = np.sort(np.concatenate(read))
    part = np.repeat(np.arange(len(nodes)), tree.last[nodes] - tree.first[nodes])
    requests = tree.order[ranges(tree.first[nodes], tree.last[nodes])]
    return SharedParts(begin[nodes], tree.end[nodes] * block_size, requests, part)


def _units(tree: PrefixTree, rows: Int64) -> tuple[Int64, Int64]:
    """Rows of those who would read a node's part each by itself: of its children, and of requests directly under it.

    ``rows`` [requests]: of the tree's requests in order. Those of one node after those of another, and [nodes + 1]:
    where they begin.
    """
    up_to = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(rows, out=up_to[1:])
    node = np.concatenate([tree.parent, tree.owner])
    of_node = np.concatenate([up_to[tree.last] - up_to[tree.first], rows])
    node += 1  # of those directly under nobody 0: they come first
    return of_node[in_order(node)[0]], np.bincount(node, minlength=len(tree.first) + 1).cumsum()


def share(tiles: Int64, parts: SharedParts, query_start: Int64, variant: int, max_tokens: int) -> Shared:
    """Takes the keys of ``parts`` out of the tiles of those who share them, and adds tiles that read them once.

    ``tiles`` [tiles, ITEM_FIELDS], ascending by request, are written in place; ``query_start`` [requests + 1]; the
    tiles that are added are of ``variant`` and have up to ``max_tokens`` tokens.
    """
    # One entry a part and tile, the parts of a tile in the order of their keys.
    of_request = tiles[:, Item.REQUEST]
    counts = np.bincount(of_request, minlength=len(query_start) - 1)
    last = counts.cumsum()[parts.requests]
    first = last - counts[parts.requests]
    tile, part = ranges(first, last), np.repeat(parts.part, last - first)
    order, tile = in_order(tile)
    part = part[order]
    begin, end = parts.begin[part], parts.end[part]
    of_tile = starts(tile)
    first, last = of_tile[:-1], of_tile[1:] - 1
    read_to = np.empty(len(tile), np.int64)
    read_to[1:] = end[:-1]
    read_to[first] = tiles[tile[first], Item.KEY_BEGIN]
    # Keys before a part that not everybody sees; only in a window.
    gap = (read_to < begin).nonzero()[0]
    tiles[tile[first], Item.STATE] = 0
    before = tiles[tile[gap]]
    before[:, Item.KEY_BEGIN], before[:, Item.KEY_END] = read_to[gap], begin[gap]
    tiles[tile[first], Item.KEY_BEGIN] = end[last]

    begin, end = query_start[parts.requests], query_start[parts.requests + 1]
    tokens = np.bincount(parts.part, end - begin).astype(np.int64)
    once = _gathered(parts, tokens, variant, max_tokens)
    read = np.bincount(parts.part) - -(-tokens // max_tokens)
    saved = int((read * (parts.end - parts.begin)).sum())
    sharing = int(np.count_nonzero(np.bincount(parts.requests)))
    return Shared(np.concatenate([tiles, before, once]), ranges(begin, end), sharing, saved)


def _gathered(parts: SharedParts, tokens: Int64, variant: int, max_tokens: int) -> Int64:
    """Tiles that read the parts, each part's with about equally many of its ``tokens`` [parts]."""
    count = -(-tokens // max_tokens)
    part = np.arange(len(count)).repeat(count)
    number = count_up(count)
    first, last = tokens[part] * number // count[part], tokens[part] * (number + 1) // count[part]
    members = np.cumsum(tokens) - tokens
    tiles = np.zeros((len(part), ITEM_FIELDS), np.int64)
    tiles[:, Item.VARIANT] = variant
    tiles[:, Item.TOKENS] = last - first
    tiles[:, Item.REQUEST] = parts.requests[np.searchsorted(parts.part, part)]
    tiles[:, Item.POSITION] = parts.end[part] - 1
    tiles[:, Item.KEY_BEGIN] = parts.begin[part]
    tiles[:, Item.KEY_END] = parts.end[part]
    tiles[:, Item.MEMBERS] = members[part] + first
    return tiles
