"""In how many splits the keys of a tile are read, so that nobody is kept busy while others wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from llmir.kernels.work_list import Item
from llmir.runtime.runs import Int32, Int64, count_up

Costs = NDArray[np.float64]

#: By so much may the longest of the threads' work exceed their average before tiles are split that could stay whole.
BALANCED = 1 / 8


class SplitPolicy(Protocol):
    """Who runs a work list, and what they want split."""

    def splits(self, cost: Costs, variant: Int32, copies: int, parts: int) -> Int64 | None:
        """Of each tile, into how many splits its keys should go at most; None: all stay whole.

        ``cost`` [tiles]: what one copy of it takes; ``variant`` [tiles]; ``copies``: of each tile, one a KV head;
        ``parts``: of everyone's share of the work, no split is longer than one.
        """
        ...


@dataclass(frozen=True)
class ByThread:
    """So many threads of a CPU, who take the items of all variants from one list."""

    threads: int

    def splits(self, cost: Costs, variant: Int32, copies: int, parts: int) -> Int64 | None:
        """See :class:`SplitPolicy`."""
        if self.threads == 1:
            return None
        most = cost.sum() * copies / (parts * self.threads)
        if cost.max(initial=0) <= most:
            return None
        return np.ceil(cost / most).astype(np.int64)


@dataclass(frozen=True)
class ByLaunch:
    """A GPU, where each variant is a launch of its own."""

    blocks: Sequence[int]
    """[variants]: thread blocks of it that run at a time."""
    prefill: int
    """The variant with large tiles."""

    def splits(self, cost: Costs, variant: Int32, copies: int, parts: int) -> Int64 | None:
        """See :class:`SplitPolicy`."""
        shares = parts * np.asarray(self.blocks)
        share = cost / (np.bincount(variant, cost, len(shares)) * copies / shares)[variant]
        splits = np.ceil(share).astype(np.int64)
        # The states of prefill's tiles are large, and where there are many tiles, splitting them gains nothing. Rounded
        # up, as many splits as the launch has shares would be a few more, which begin when all others are done; but a
        # tile of nearly two shares is too long to stay whole.
        prefill = variant == self.prefill
        if _balanced(cost[prefill], copies, self.blocks[self.prefill]):
            splits[prefill] = 1
        else:
            several = prefill & (share >= 2)
            splits[several] = share[several]
        return splits


def split(tiles: Int32, splits: Int64 | None, least_keys: int, key_chunk: Int64) -> Int32:
    """Cuts the key ranges of ``tiles`` into at most ``splits`` [tiles] of whole chunks, and no shorter than asked.

    The STATE of what is split is 0. ``tiles`` [tiles, ITEM_FIELDS]; ``key_chunk`` [variants].
    """
    if splits is None or not (splits > 1).any():
        return tiles
    keys = tiles[:, Item.KEY_END] - tiles[:, Item.KEY_BEGIN]
    chunk = key_chunk[tiles[:, Item.VARIANT]]
    length = -(-keys // np.maximum(np.minimum(splits, keys // least_keys), 1))
    length = np.maximum(-(-length // chunk) * chunk, chunk)
    count = -(-keys // length)
    source = np.arange(len(tiles)).repeat(count)
    cut, length = tiles[source], length[source]
    cut[:, Item.KEY_BEGIN] += count_up(count) * length
    cut[:, Item.KEY_END] = np.minimum(cut[:, Item.KEY_BEGIN] + length, cut[:, Item.KEY_END])
    cut[count[source] > 1, Item.STATE] = 0
    return cut


def _balanced(cost: Costs, copies: int, threads: int) -> bool:
    """Whether whole tiles, so many copies of each, keep so many threads busy to the end when the longest come first.

    A tile that begins when everybody has had n takes with them at least n + 1 times its own cost, which bounds the
    longest thread's work from below. It comes to that for tiles that are all alike, and for those of a prompt, which
    grow evenly, over two rounds; over more these are balanced anyway.
    """
    if not len(cost):
        return True
    longest_first = np.sort(cost)[::-1]
    begins = np.arange(0, len(cost) * copies, threads)
    longest = (longest_first[begins // copies] * np.arange(1, len(begins) + 1)).max()
    return bool(longest <= (1 + BALANCED) * cost.sum() * copies / threads)
