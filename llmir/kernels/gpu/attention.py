"""Attention on a GPU: a thread block takes an item of the work list, its rows one tile, and goes through its keys.

Page numbers are loaded one tile of keys ahead into registers and carried to the next turn of the loop. Loaded where
they are used, they would be a level of Triton's software pipeline of their own, and of any number of stages only one
tile of keys and one of values would be in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from llmir.kernels.gpu.merge import LOG2_E
from llmir.kernels.gpu.rounding import narrowed
from llmir.kernels.gpu.step import Header
from llmir.kernels.work_list import ITEM_FIELDS, Item

_STATE_ROWS = tl.constexpr(int(Header.STATE_ROWS))
_MERGE_TOKENS = tl.constexpr(int(Header.MERGE_TOKENS))
_MEMBERS_PLACE = tl.constexpr(int(Header.MEMBERS))
_VARIANTS = tl.constexpr(int(Header.VARIANTS))
_ITEM_FIELDS = tl.constexpr(ITEM_FIELDS)
_TOKEN = tl.constexpr(int(Item.TOKEN))
_TOKENS = tl.constexpr(int(Item.TOKENS))
_REQUEST = tl.constexpr(int(Item.REQUEST))
_POSITION = tl.constexpr(int(Item.POSITION))
_KEY_BEGIN = tl.constexpr(int(Item.KEY_BEGIN))
_KEY_END = tl.constexpr(int(Item.KEY_END))
_STATE = tl.constexpr(int(Item.STATE))
_MEMBERS = tl.constexpr(int(Item.MEMBERS))


@triton.jit
def attend(
    query,
    cache,
    block_table,
    step,
    state_stats,
    state_values,
    sinks,
    key_scale,
    value_scale,
    output,
    query_stride,
    output_stride,
    table_stride,
    VARIANT: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    QUANTIZED: tl.constexpr,
    SINKS: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    UNMASKED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Programs take the items of one variant in turn; any number of programs does all of them.

    ``query``, ``output`` [tokens, KV_HEADS * GROUP, HEAD], strides in elements from one token to the next; ``cache``
    [blocks, KV_HEADS, 2, BLOCK, HEAD]; ``block_table`` int32 [requests, table_stride]; ``step``, ``state_stats`` and
    ``state_values`` as for merge; ``sinks`` [heads]; ``key_scale``, ``value_scale`` float32 [1]. A row is a query head
    of a token. UNMASKED: keys that all rows see have a loop of their own, without masks. EMULATED: Triton's interpreter
    runs this, whose products of bfloat16 multiply the numbers' bits.
    """
    count = tl.load(step + _VARIANTS + 2 * VARIANT) * KV_HEADS
    items = step + tl.load(step + _VARIANTS + 2 * VARIANT + 1)
    rows, inside = tl.arange(0, ROWS), tl.arange(0, PADDED_HEAD)
    in_head = inside < HEAD
    scale = SCALE * LOG2_E
    if QUANTIZED:
        scale *= tl.load(key_scale)
    # What a product of query and key is multiplied by inside tanh, with its 2, and inside the power of 2.
    score_scale = 2 * scale / SOFT_CAP if SOFT_CAP > 0 else 1.0
    exponent_scale = SOFT_CAP * LOG2_E if SOFT_CAP > 0 else scale

    for index in tl.range(tl.program_id(0), count, tl.num_programs(0), num_stages=1):
        item, head = items + (index // KV_HEADS) * _ITEM_FIELDS, index % KV_HEADS
        begin, end = tl.load(item + _KEY_BEGIN), tl.load(item + _KEY_END)
        position = tl.load(item + _POSITION)
        gathered = tl.load(item + _MEMBERS)
        row_ok = rows // GROUP < tl.load(item + _TOKENS)
        token = _token(step, item, gathered, rows // GROUP)
        # Row r sees the keys before limit[r]; those of gathered tokens see all keys of the item.
        limit = position + 1 + tl.where(gathered >= 0, 0, rows // GROUP)
        row_place = (head * GROUP + rows % GROUP) * HEAD
        q_place = (token * query_stride + row_place)[:, None] + inside[None, :]
        q = tl.load(query + q_place, mask=row_ok[:, None] & in_head[None, :], other=0.0)

        maximum = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        summed = tl.zeros([ROWS, PADDED_HEAD], tl.float32)
        table = block_table + tl.load(item + _REQUEST).to(tl.int64) * table_stride
        pages = cache + head * (2 * BLOCK * HEAD)
        seen_by_all = begin
        if UNMASKED:
            seen_by_all += tl.maximum(tl.minimum(position + 1, end) - begin, 0) // KEYS * KEYS
        for MASKED in tl.static_range(0 if UNMASKED else 1, 2):
            part_begin, part_end = (seen_by_all, end) if MASKED else (begin, seen_by_all)
            page = _page(table, part_begin, end, KEYS, BLOCK)
            for first in tl.range(part_begin, part_end, KEYS, num_stages=STAGES):
                next_page = _page(table, first + KEYS, end, KEYS, BLOCK)
                k, v = _keys(pages, page, first, end, KEYS, KV_HEADS, HEAD, BLOCK, PADDED_HEAD, MASKED)
                scores = _scores(q, k, first, end, limit, score_scale, WINDOW, SOFT_CAP, MASKED, EMULATED)
                maximum, total, summed = _add(scores, v, maximum, total, summed, exponent_scale, q.dtype, EMULATED)
                page = next_page

        maximum *= exponent_scale
        if QUANTIZED:
            summed *= tl.load(value_scale)
        state = tl.load(item + _STATE)
        written = row_ok[:, None] & in_head[None, :]
        if state >= 0:
            place = tl.load(step + _STATE_ROWS).to(tl.int64) * head + state + rows
            tl.store(state_stats + 2 * place, maximum, mask=row_ok)
            tl.store(state_stats + 2 * place + 1, total, mask=row_ok)
            tl.store(state_values + place[:, None] * HEAD + inside[None, :], summed, mask=written)
        else:
            if SINKS:
                sink = tl.load(sinks + head * GROUP + rows % GROUP).to(tl.float32) * LOG2_E
                highest = tl.maximum(maximum, sink)
                before = tl.exp2(maximum - highest)
                total = total * before + tl.exp2(sink - highest)
                summed *= before[:, None]
            out_place = (token * output_stride + row_place)[:, None] + inside[None, :]
            tl.store(
                output + out_place, narrowed(summed / total[:, None], output.dtype.element_ty, EMULATED), mask=written
            )


@triton.jit
def _token(step, item, gathered, i):
    """The rows of query and output of an item's tokens ``i``, int64."""
    listed = i < tl.where(gathered >= 0, tl.load(item + _TOKENS), 0)
    members = step + tl.load(step + _MEMBERS_PLACE) + gathered
    number = tl.load(members + i, mask=listed, other=0)
    token = tl.load(step + tl.load(step + _MERGE_TOKENS) + number, mask=listed, other=0)
    return tl.where(gathered >= 0, token, tl.load(item + _TOKEN) + i).to(tl.int64)


@triton.jit
def _page(table, first, end, KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks of the keys from ``first`` on: one number where the tile lies in one block, else one a key.

    Keys at and after ``end`` count as the last before it, so that no entry is read that is not there.
    """
    if BLOCK % KEYS == 0:
        return tl.load(table + tl.minimum(first, end - 1) // BLOCK)
    else:
        return tl.load(table + tl.minimum(first + tl.arange(0, KEYS), end - 1) // BLOCK)


@triton.jit
def _keys(
    pages,
    page,
    first,
    end,
    KEYS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A tile of keys, and of values, [KEYS, PADDED_HEAD]; 0 from ``end`` on."""
    position, inside = first + tl.arange(0, KEYS), tl.arange(0, PADDED_HEAD)
    in_block = page.to(tl.int64) * (KV_HEADS * 2 * BLOCK * HEAD)
    if BLOCK % KEYS == 0:
        in_block += (first % BLOCK) * HEAD
        place = pages + in_block + tl.arange(0, KEYS) * HEAD
    else:
        place = pages + in_block + (position % BLOCK) * HEAD
    # Keys lie in a tile as values do, so that both share the arithmetic of their places; the product turns them.
    place = place[:, None] + inside[None, :]
    if MASKED or HEAD != PADDED_HEAD:
        there = (position < end)[:, None] & (inside < HEAD)[None, :]
        k = tl.load(place, mask=there, other=0.0)
        v = tl.load(place + BLOCK * HEAD, mask=there, other=0.0)
    else:
        k = tl.load(place)
        v = tl.load(place + BLOCK * HEAD)
    return k, v


@triton.jit
def _scores(
    q,
    k,
    first,
    end,
    limit,
    score_scale,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Products of queries and a tile of keys [ROWS, KEYS], not scaled, or capped to -1 and 1; -inf where unseen."""
    if EMULATED:
        scores = tl.dot(q.to(tl.float32), tl.trans(k.to(tl.float32)), input_precision="ieee")
    else:
        scores = tl.dot(q, tl.trans(k.to(q.dtype)))
    if SOFT_CAP > 0:
        # tanh(y) = 1 - 2 / (exp(2 y) + 1), which neither overflows to NaN nor needs a library.
        scores = 1 - 2 / (tl.exp2(scores * score_scale) + 1)
    if MASKED:
        position = first + tl.arange(0, k.shape[0])
        seen = position[None, :] < tl.minimum(limit, end)[:, None]
        if WINDOW > 0:
            seen = seen & (position[None, :] >= limit[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _add(
    scores,
    v,
    maximum,
    total,
    summed,
    exponent_scale,
    element: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """Online softmax in base 2 (Dao, FlashAttention-2, 2023): a tile's weights, and its values weighted, are added."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen no key yet, or none with a score above -inf.
    base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    # The scale comes last: it is one multiply-add with what is subtracted.
    before = tl.exp2((maximum - base) * exponent_scale)
    weights = tl.exp2(scores * exponent_scale - (base * exponent_scale)[:, None])
    total = total * before + tl.sum(weights, 1)
    weights = narrowed(weights, element, EMULATED)
    if EMULATED:
        summed = summed * before[:, None] + tl.dot(
            weights.to(tl.float32), v.to(element).to(tl.float32), input_precision="ieee"
        )
    else:
        summed = tl.dot(weights, v.to(element), summed * before[:, None])
    return new_maximum, total, summed
