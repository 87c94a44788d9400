"""Which parts of a step's caches are read once for several requests, and the work items that do it.

A node of the prefix tree may be read once for everybody under it; or be left to its children, each of which then reads
it together with its own part; or, where a request is alone below it, be read with the rest of the request.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmir.ir.sharing_costs import pays
from llmir.ir.signature import SharingCosts
from llmir.kernels.work_list import ITEM_FIELDS, Item
from llmir.runtime.prefix_tree import PrefixTree

Int64 = NDArray[np.int64]


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
    of_ordered = rows[tree.order]
    children: dict[int, list[int]] = defaultdict(list)
    parents = tree.parent.tolist()
    for node, parent in enumerate(parents):
        children[parent].append(node)
    done: dict[int, int] = {-1: 0}  # up to where the keys of a node have been read once
    begins, ends, requests = [], [], [np.empty(0, np.int64)]
    for node, parent in enumerate(parents):
        under = tree.order[tree.first[node] : tree.last[node]]
        seen_by_all = int(first_keys[under].max())
        begin = max(done[parent], -(-seen_by_all // block_size) * block_size)
        end = int(tree.end[node]) * block_size
        done[node] = done[parent]
        if end > begin and pays(costs, end - begin, _units(tree, node, children[node], of_ordered), row_tile):
            begins.append(begin)
            ends.append(end)
            requests.append(under)
            done[node] = end
    part = np.repeat(np.arange(len(begins)), [len(each) for each in requests[1:]])
    return SharedParts(np.array(begins, np.int64), np.array(ends, np.int64), np.concatenate(requests), part)


def _units(tree: PrefixTree, node: int, children: list[int], rows: Int64) -> Int64:
    """Rows of those who would read a node's part each by itself: of its children, and of requests directly under it."""
    position, units = int(tree.first[node]), []
    for child in children:
        first, last = int(tree.first[child]), int(tree.last[child])
        units += [rows[position:first], rows[first:last].sum(keepdims=True)]
        position = last
    return np.concatenate([*units, rows[position : tree.last[node]]])


def share(tiles: Int64, parts: SharedParts, query_start: Int64, variant: int, max_tokens: int) -> Shared:
    """Takes the keys of ``parts`` out of the tiles of those who share them, and adds tiles that read them once.

    ``tiles`` [tiles, ITEM_FIELDS], ascending by request, are written in place; ``query_start`` [requests + 1]; the
    tiles that are added are of ``variant`` and have up to ``max_tokens`` tokens.
    """
    # One entry a part and tile, the parts of a tile in the order of their keys.
    of_request = tiles[:, Item.REQUEST]
    first, last = (np.searchsorted(of_request, parts.requests, side) for side in ("left", "right"))
    tile, part = ranges(first, last), np.repeat(parts.part, last - first)
    order = np.argsort(tile, kind="stable")
    tile, part = tile[order], part[order]
    is_first = np.diff(tile, prepend=-1) > 0
    read_to = np.where(is_first, tiles[tile, Item.KEY_BEGIN], np.append(0, parts.end[part[:-1]]))
    tiles[tile, Item.STATE] = 0
    # Keys before a part that not everybody sees; only in a window.
    gap = np.flatnonzero(read_to < parts.begin[part])
    before = tiles[tile[gap]]
    before[:, Item.KEY_BEGIN], before[:, Item.KEY_END] = read_to[gap], parts.begin[part[gap]]
    is_last = np.append(is_first[1:], True)
    tiles[tile[is_last], Item.KEY_BEGIN] = parts.end[part[is_last]]

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
    part = np.repeat(np.arange(len(count)), count)
    number = ranges(np.zeros_like(count), count)
    first, last = (tokens[part] * n // count[part] for n in (number, number + 1))
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


def ranges(begin: Int64, end: Int64) -> Int64:
    """All numbers of each range, one range after the other."""
    counts = end - begin
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(begin - before, counts)
