"""The merge on a GPU: what the parts of a token's attention left, put together by log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl

from llmir.kernels.gpu.rounding import narrowed
from llmir.kernels.gpu.step import Header

_MERGES = tl.constexpr(int(Header.MERGES))
_STATE_ROWS = tl.constexpr(int(Header.STATE_ROWS))
_TOKENS = tl.constexpr(int(Header.MERGE_TOKENS))
_BEGIN = tl.constexpr(int(Header.MERGE_BEGIN))
_SOURCES = tl.constexpr(int(Header.MERGE_SOURCES))
LOG2_E = tl.constexpr(1.4426950408889634)
#: Above -inf, from which a part's maximum of -inf can be taken: its weight is then 0, and not NaN.
_LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def merge(
    step,
    state_stats,
    state_values,
    sinks,
    output,
    output_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    SINKS: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    PARTS: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Programs take the merges of a step in turn, a query head at a time; any number of programs does all of them.

    ``step`` as step.py packs it; ``state_stats`` float32 [KV heads, STATE_ROWS, 2], maximum (base 2) and sum;
    ``state_values`` float32 [KV heads, STATE_ROWS, HEAD], not divided by the sum; ``sinks`` [heads]; ``output``
    [tokens, heads, HEAD]. States are read PARTS at a time.
    """
    count = tl.load(step + _MERGES) * (KV_HEADS * GROUP)
    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        number, head = index // (KV_HEADS * GROUP), index % (KV_HEADS * GROUP)
        begin = tl.load(step + tl.load(step + _BEGIN) + number)
        end = tl.load(step + tl.load(step + _BEGIN) + number + 1)
        sources = step + tl.load(step + _SOURCES)
        first_row = tl.load(step + _STATE_ROWS).to(tl.int64) * (head // GROUP) + head % GROUP
        parts, inside = tl.arange(0, PARTS), tl.arange(0, PADDED_HEAD)
        if SINKS:
            maximum = tl.load(sinks + head).to(tl.float32) * LOG2_E
            total = tl.full([], 1.0, tl.float32)
        else:
            maximum = tl.full([], _LEAST, tl.float32)
            total = tl.full([], 0.0, tl.float32)
        summed = tl.zeros([PADDED_HEAD], tl.float32)
        for first in tl.range(begin, end, PARTS, num_stages=1):
            there = first + parts < end
            row = first_row + tl.load(sources + first + parts, mask=there, other=0)
            part_maximum = tl.load(state_stats + 2 * row, mask=there, other=float("-inf"))
            part_total = tl.load(state_stats + 2 * row + 1, mask=there, other=0.0)
            values_there = there[:, None] & (inside[None, :] < HEAD)
            values = tl.load(state_values + row[:, None] * HEAD + inside[None, :], mask=values_there, other=0.0)
            new_maximum = tl.maximum(maximum, tl.max(part_maximum, 0))
            weight = tl.exp2(part_maximum - new_maximum)
            before = tl.exp2(maximum - new_maximum)
            total = total * before + tl.sum(part_total * weight, 0)
            summed = summed * before + tl.sum(values * weight[:, None], 0)
            maximum = new_maximum
        token = tl.load(step + tl.load(step + _TOKENS) + number).to(tl.int64)
        place = output + token * output_stride + head * HEAD + inside
        tl.store(place, narrowed(summed / total, output.dtype.element_ty, EMULATED), mask=inside < HEAD)
