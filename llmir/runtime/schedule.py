"""Cuts one step of a serving framework into the work items of the attention kernel.

A step is a batch of requests, each with some new query tokens at the end of its sequence: one when it decodes,
many when it prefills, any mixture of both. The same items serve all of it. What requests share of their caches
(sharing.py) is read by items of its own, whose tokens are gathered from all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.ir.ranges import step_problems
from llmir.kernels.work_list import ITEM_FIELDS, Item
from llmir.runtime.merges import Merges, merges_of
from llmir.runtime.prefix_finder import PrefixFinder
from llmir.runtime.prefix_tree import PrefixTree
from llmir.runtime.runs import Int32, Int64, count_up, in_order
from llmir.runtime.sharing import Shared, SharedParts, share, shared_parts
from llmir.runtime.split import SplitPolicy, split
from llmir.runtime.step import Step

_NO_TOKENS = np.empty(0, np.int64)
#: Items that cost more are in no order among themselves.
MOST_COST = 1 << 40


@dataclass(frozen=True)
class Schedule:
    """The work list of one step, the same for every layer of one kernel."""

    items: Int32
    """[items, ITEM_FIELDS], longest first: of the first KV head; the others have the same."""
    merges: Merges
    """Tokens whose attention is in parts."""
    shared_requests: int
    """Requests of which a part is read together with that of others."""
    keys_not_read: int
    """Keys, of every KV head, that would have been read once more for each of them."""
    without_room: bool = False
    """Whether nothing is shared only because what runs it has no room for that many parts."""


class Scheduler:
    """Makes the work lists of one kernel: tile sizes from ``spec``, run-time conditions from ``policy``."""

    def __init__(self, spec: KernelSpec, policy: StepPolicy):
        """Raises KernelError where a step's new tokens would not all find an item: seen here once, and in no step."""
        if problems := step_problems(spec, policy):
            raise KernelError(f"no step can be scheduled for {spec.symbol}: {'; '.join(problems)}")
        self._heads = spec.attention.num_kv_heads
        self._queries_per_kv = spec.attention.queries_per_kv
        self._window, self._ahead = spec.attention.mask.window, spec.attention.mask.ahead
        self._block_size = spec.attention.cache.block_size
        self._policy = policy
        names = [variant.name for variant in spec.variants]
        self._decode, self._prefill = names.index("decode"), names.index("prefill")
        self._max_tokens = np.array([v.max_tokens for v in spec.variants])
        self._key_chunk = np.array([v.key_chunk for v in spec.variants])
        self._row_tile = np.array([v.row_tile for v in spec.variants])
        costs = policy.sharing
        # A key costs an item at least its reading: as much as so many tiles of rows.
        self._read_tiles = costs.read_key / costs.tile_key if costs else 1.0
        self._finder = PrefixFinder()
        self._shared: tuple[PrefixTree, Int64, SharedParts | None] | None = None

    def schedule(self, step: Step, split_policy: SplitPolicy) -> Schedule:
        """The work list of a step."""
        starts, lengths = np.asarray(step.query_start, np.int64), np.asarray(step.seq_lens, np.int64)
        new_tokens = starts[1:] - starts[:-1]
        tiles = self._tiles(starts[:-1], new_tokens, lengths)
        parts = self._parts(new_tokens, lengths, step)
        shared = Shared(tiles, _NO_TOKENS, 0, 0)
        if parts is not None:
            shared = share(tiles, parts, starts, self._prefill, int(self._max_tokens[self._prefill]))
        tiles, cost = shared.tiles, self._cost(shared.tiles)
        splits = split_policy.splits(cost, tiles[:, Item.VARIANT], self._heads, self._policy.items_per_thread)
        cut = split(tiles, splits, self._policy.split_keys, self._key_chunk)
        if cut is not tiles:
            tiles, cost = cut, self._cost(cut)
        merges = merges_of(tiles, shared.tokens, self._queries_per_kv, self._row_tile)
        longest_first, _ = in_order(MOST_COST - np.minimum(cost, MOST_COST).astype(np.int64))
        items = tiles.take(longest_first, axis=0)
        if step.rows is not None:
            items[:, Item.REQUEST] = step.rows[items[:, Item.REQUEST]]
        return Schedule(items, merges, shared.requests, shared.keys_not_read)

    def _tiles(self, token: Int64, new_tokens: Int64, seq_lens: Int64) -> Int32:
        """One row per tile of query tokens: items without their KV head. ``token``: the first of each request."""
        variant = np.where(new_tokens <= self._policy.decode_tokens, self._decode, self._prefill)
        request, tokens, end = np.arange(len(new_tokens)), new_tokens, seq_lens
        if not (new_tokens == 1).all():
            size = self._max_tokens[variant]
            count = -(-new_tokens // size)
            request, first = request.repeat(count), count_up(count) * size.repeat(count)
            variant, token, left = variant[request], token[request] + first, new_tokens[request] - first
            tokens = np.minimum(size[request], left)
            end = seq_lens[request] - left + tokens
        tiles = np.full((len(request), ITEM_FIELDS), -1, np.int32)
        tiles[:, Item.VARIANT] = variant
        tiles[:, Item.TOKEN] = token
        tiles[:, Item.TOKENS] = tokens
        tiles[:, Item.KV_HEAD] = 0
        tiles[:, Item.REQUEST] = request
        tiles[:, Item.POSITION] = end - tokens
        tiles[:, Item.KEY_BEGIN] = self._first_key(tiles)
        tiles[:, Item.KEY_END] = self._last_key(end, seq_lens[request])
        return tiles

    def _last_key(self, end: Int64, seq_lens: Int64) -> Int64:
        """Behind the last key that any of a tile's tokens sees; ``end``: behind the last of them."""
        return seq_lens if self._ahead is None else np.minimum(end + self._ahead, seq_lens)

    def _first_key(self, tiles: Int32) -> Int64 | int:
        """The chunk in which the first token's window begins."""
        if not self._window:
            return 0
        chunk = self._key_chunk[tiles[:, Item.VARIANT]]
        return np.maximum(tiles[:, Item.POSITION] - self._window + 1, 0) // chunk * chunk

    def _cost(self, items: Int32) -> NDArray[np.float64]:
        """Keys times row tiles, as far as their products take longer than reading: what an item's time grows with."""
        rows = items[:, Item.TOKENS] * self._queries_per_kv
        row_tiles = -(-rows // self._row_tile[items[:, Item.VARIANT]])
        return (items[:, Item.KEY_END] - items[:, Item.KEY_BEGIN]) * np.maximum(row_tiles, self._read_tiles)

    def _parts(self, new_tokens: Int64, seq_lens: Int64, step: Step) -> SharedParts | None:
        """What is read once in a step; decided anew where the tree or the rows have changed."""
        costs = self._policy.sharing
        if costs is None or step.block_table is None:
            return None
        rows = new_tokens * self._queries_per_kv
        blocks = (seq_lens - new_tokens) // self._block_size  # what this step writes is nobody else's
        blocks[(rows > costs.most_rows) | (new_tokens == 0)] = 0
        tree = self._finder.find(step.block_table, blocks, step.rows, step.unchanged)
        if not len(tree.first):
            return None
        first_keys = np.maximum(seq_lens - self._window, 0) if self._window else None
        if not self._window and self._shared and self._shared[0] is tree and np.array_equal(self._shared[1], rows):
            return self._shared[2]
        found = shared_parts(tree, rows, first_keys, self._block_size, int(self._row_tile[self._prefill]), costs)
        parts = found if len(found.begin) else None
        self._shared = (tree, rows, parts)
        return parts
