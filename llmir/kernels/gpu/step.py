"""The work list of a step as a GPU reads it: one array of int32, which goes to the device in one copy.

It begins with a header of counts and places, so that kernels in a captured CUDA graph, whose arguments never change,
find whatever the step has.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from llmir.kernels.work_list import Item

Int32 = NDArray[np.int32]


class Header(IntEnum):
    """Columns of the header; a place counts int32 from the beginning of the array."""

    STATE_ROWS = 0  # rows of states that the items of one KV head leave
    MERGES = 1
    MERGE_TOKENS = 2  # place of [merges]: the token whose states are merged
    MERGE_BEGIN = 3  # place of [merges + 1]: its place in the sources
    MERGE_SOURCES = 4  # place of the rows of states, of a token's first query head
    MEMBERS = 5  # place of the merges of gathered tokens, item by item
    VARIANTS = 6  # of each variant: how many items, and the place of [items, ITEM_FIELDS]


#: Whole cache lines of 128 bytes, so that items begin with one.
HEADER_FIELDS = 32


def pack(items: Int32, variants: int, merge_arrays: Sequence[Int32], state_rows: int) -> Int32:
    """The array of one step.

    ``items`` [items, ITEM_FIELDS] in any order, which those of a variant keep; ``variants``: how many the kernel has;
    ``merge_arrays``: tokens, begin, sources and members, as Merges has them.
    """
    of_variant = [items[items[:, Item.VARIANT] == variant] for variant in range(variants)]
    header = np.zeros(HEADER_FIELDS, np.int32)
    header[Header.STATE_ROWS], header[Header.MERGES] = state_rows, len(merge_arrays[0])
    parts, place = [header], HEADER_FIELDS
    for variant, its_items in enumerate(of_variant):
        header[Header.VARIANTS + 2 * variant : Header.VARIANTS + 2 * variant + 2] = len(its_items), place
        parts.append(its_items.reshape(-1))
        place += its_items.size
    columns = (Header.MERGE_TOKENS, Header.MERGE_BEGIN, Header.MERGE_SOURCES, Header.MEMBERS)
    for column, numbers in zip(columns, merge_arrays, strict=True):
        header[column] = place
        parts.append(numbers)
        place += numbers.size
    return np.concatenate(parts, dtype=np.int32)


def item_counts(packed: Int32, variants: int) -> list[int]:
    """Items of each variant."""
    return packed[Header.VARIANTS : Header.VARIANTS + 2 * variants : 2].tolist()
