"""Small Triton programs that each do one thing, to measure how fast a GPU does it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_tiles(memory, places, sums, tiles, PARTS: tl.constexpr, PART: tl.constexpr):
    """Programs take tiles in turn: PARTS parts of PART elements each, wherever they lie, as attention reads pages.

    ``memory`` int32; ``places`` int64 [tiles * PARTS]: where each part begins, a multiple of 16; ``sums`` int32
    [programs], so that no element is unused.
    """
    part, inside = tl.arange(0, PARTS), tl.arange(0, PART)
    total = tl.zeros([PARTS, PART], tl.int32)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        place = tl.multiple_of(tl.load(places + tile * PARTS + part), 16)
        total += tl.load(memory + place[:, None] + inside[None, :])
    tl.store(sums + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit
def chase(links, end, steps):
    """One access after the other: each element of ``links`` (int64) says where the next one is."""
    place = tl.zeros([], tl.int64)
    for _ in range(steps):
        place = tl.load(links + place)
    tl.store(end, place)


@triton.jit
def nothing(_memory):
    """What launching costs."""
