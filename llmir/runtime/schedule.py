"""Cuts one step of a serving framework into the work items of the attention kernel.

A step is a batch of requests, each with some new query tokens at the end of its sequence: one when it decodes,
many when it prefills, any mixture of both. The same items serve all of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmir.ir.signature import KernelSpec, StepPolicy
from llmir.kernels.cpu.abi import ITEM_FIELDS, Item

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """The work list of one step, the same for every layer of one kernel."""

    items: Int32
    """[items, ITEM_FIELDS], longest first."""
    partial_slots: int
    """Splits that leave a partial state."""
    split_groups: int
    """Items that were split."""


class Scheduler:
    """Makes the work lists of one kernel: tile sizes from ``spec``, run-time conditions from ``policy``."""

    def __init__(self, spec: KernelSpec, policy: StepPolicy):
        self._heads = spec.signature.num_kv_heads
        self._queries_per_kv = spec.signature.queries_per_kv
        self._window = spec.signature.window
        self._policy = policy
        names = [variant.name for variant in spec.variants]
        self._decode, self._prefill = names.index("decode"), names.index("prefill")
        self._max_tokens = np.array([v.max_tokens for v in spec.variants])
        self._key_chunk = np.array([v.key_chunk for v in spec.variants])
        self._row_tile = np.array([v.row_tile for v in spec.variants])

    def schedule(self, query_start: Int32, seq_lens: Int32, threads: int) -> Schedule:
        """The work list of a step.

        ``query_start`` [requests + 1]: where each request's new tokens begin among the step's tokens;
        ``seq_lens`` [requests]: tokens of each request, the new ones included; ``threads``: who will run it.
        """
        tiles = self._tiles(np.asarray(query_start, np.int64), np.asarray(seq_lens, np.int64))
        items = np.repeat(tiles, self._heads, axis=0)
        items[:, Item.KV_HEAD] = np.tile(np.arange(self._heads), len(tiles))
        items, slots, groups = self._split(items, threads)
        order = np.argsort(-self._cost(items), kind="stable")
        return Schedule(np.ascontiguousarray(items[order], dtype=np.int32), slots, groups)

    def _tiles(self, query_start: Int64, seq_lens: Int64) -> Int64:
        """One row per tile of query tokens: items without their KV head."""
        new_tokens = np.diff(query_start)
        variant = np.where(new_tokens <= self._policy.decode_tokens, self._decode, self._prefill)
        size = self._max_tokens[variant]
        count = -(-new_tokens // size)
        request = np.repeat(np.arange(len(new_tokens)), count)
        first = np.arange(len(request)) - np.repeat(np.cumsum(count) - count, count)
        first *= size[request]
        tiles = np.empty((len(request), ITEM_FIELDS), np.int64)
        tiles[:, Item.VARIANT] = variant[request]
        tiles[:, Item.TOKEN] = query_start[request] + first
        tiles[:, Item.TOKENS] = np.minimum(size[request], new_tokens[request] - first)
        tiles[:, Item.REQUEST] = request
        tiles[:, Item.POSITION] = seq_lens[request] - new_tokens[request] + first
        tiles[:, Item.KEY_BEGIN] = self._first_key(tiles)
        tiles[:, Item.KEY_END] = tiles[:, Item.POSITION] + tiles[:, Item.TOKENS]
        tiles[:, [Item.PARTIAL, Item.FIRST_PARTIAL, Item.GROUP]] = -1
        tiles[:, Item.SPLITS] = 1
        return tiles

    def _first_key(self, tiles: Int64) -> Int64 | int:
        """The chunk in which the first token's window begins."""
        if not self._window:
            return 0
        chunk = self._key_chunk[tiles[:, Item.VARIANT]]
        return np.maximum(tiles[:, Item.POSITION] - self._window + 1, 0) // chunk * chunk

    def _cost(self, items: Int64) -> Int64:
        """Keys times row tiles: what an item's time grows with."""
        rows = items[:, Item.TOKENS] * self._queries_per_kv
        row_tiles = -(-rows // self._row_tile[items[:, Item.VARIANT]])
        return (items[:, Item.KEY_END] - items[:, Item.KEY_BEGIN]) * row_tiles

    def _split(self, items: Int64, threads: int) -> tuple[Int64, int, int]:
        """Splits the key ranges of long items while there are too few items to keep all threads busy.

        Gives the items, the partial slots they use and the number of split groups.
        """
        wanted = self._policy.items_per_thread * threads
        if threads == 1 or len(items) >= wanted:
            return items, 0, 0
        keys = items[:, Item.KEY_END] - items[:, Item.KEY_BEGIN]
        cost = self._cost(items)
        splits = np.minimum(-(-cost * wanted // cost.sum()), keys // self._policy.split_keys)
        chunk = self._key_chunk[items[:, Item.VARIANT]]
        length = -(-keys // np.maximum(splits, 1))
        length = np.maximum(-(-length // chunk) * chunk, chunk)
        splits = -(-keys // length)
        return self._cut(items, splits, length)

    def _cut(self, items: Int64, splits: Int64, length: Int64) -> tuple[Int64, int, int]:
        """Cuts every item into ``splits`` ranges of ``length`` keys."""
        source = np.repeat(np.arange(len(items)), splits)
        part = np.arange(len(source)) - np.repeat(np.cumsum(splits) - splits, splits)
        pieces = items[source]
        pieces[:, Item.KEY_BEGIN] += part * length[source]
        pieces[:, Item.KEY_END] = np.minimum(pieces[:, Item.KEY_BEGIN] + length[source], pieces[:, Item.KEY_END])
        divided = splits > 1
        slots = np.where(divided, splits, 0)
        first_slot = np.cumsum(slots) - slots
        inside = divided[source]
        pieces[inside, Item.FIRST_PARTIAL] = first_slot[source][inside]
        pieces[inside, Item.PARTIAL] = (first_slot[source] + part)[inside]
        pieces[inside, Item.SPLITS] = splits[source][inside]
        pieces[inside, Item.GROUP] = (np.cumsum(divided) - 1)[source][inside]
        return pieces, int(slots.sum()), int(divided.sum())
