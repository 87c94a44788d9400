"""Which parts of a step's caches are read once for several requests.

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
from llmir.runtime.prefix_tree import PrefixTree

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class SharedPart:
    """A range of keys that is read once."""

    requests: Int64
    """Who shares it."""
    begin: int
    end: int


def shared_parts(
    tree: PrefixTree, rows: Int64, first_keys: Int64, block_size: int, row_tile: int, costs: SharingCosts
) -> list[SharedPart]:
    """The parts of ``tree`` that are read once, each request's in the order of their keys.

    ``rows`` [requests]: query rows of a KV head; ``first_keys`` [requests]: the first key that all tokens of a request
    may see (its window), 0 where there is none.
    """
    of_ordered = rows[tree.order]
    children: dict[int, list[int]] = defaultdict(list)
    for node, parent in enumerate(tree.parent.tolist()):
        children[parent].append(node)
    done: dict[int, int] = {-1: 0}  # up to where the keys of a node have been read once
    parts = []
    for node, parent in enumerate(tree.parent.tolist()):
        requests = tree.order[tree.first[node] : tree.last[node]]
        seen_by_all = int(first_keys[requests].max())
        begin = max(done[parent], -(-seen_by_all // block_size) * block_size)
        end = int(tree.end[node]) * block_size
        done[node] = done[parent]
        if end > begin and pays(costs, end - begin, _units(tree, node, children[node], of_ordered), row_tile):
            parts.append(SharedPart(requests, begin, end))
            done[node] = end
    return parts


def _units(tree: PrefixTree, node: int, children: list[int], rows: Int64) -> Int64:
    """Rows of those who would read a node's part each by itself: of its children, and of requests directly under it."""
    position, units = int(tree.first[node]), []
    for child in children:
        first, last = int(tree.first[child]), int(tree.last[child])
        units += [rows[position:first], rows[first:last].sum(keepdims=True)]
        position = last
    return np.concatenate([*units, rows[position : tree.last[node]]])
