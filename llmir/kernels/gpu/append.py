"""append_kv on a GPU: a step's keys and values into their slots of the paged cache, quantized where the cache is."""

from __future__ import annotations

import triton
import triton.language as tl

from llmir.kernels.gpu.rounding import quantized


@triton.jit
def append_kv(
    key,
    value,
    cache,
    slots,
    key_scale,
    value_scale,
    key_stride,
    value_stride,
    KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    QUANTIZED: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_HEAD: tl.constexpr,
    EMULATED: tl.constexpr,
):
    """One program a token: all its KV heads.

    ``key``, ``value`` [tokens, KV_HEADS, HEAD], strides in elements from one token to the next; ``cache``
    [blocks, KV_HEADS, 2, BLOCK, HEAD]; ``slots`` int64 [tokens], negative: the token is not kept; ``key_scale``,
    ``value_scale`` float32 [1], which a quantized cache divides by.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    heads = tl.arange(0, PADDED_HEADS)
    inside = tl.arange(0, PADDED_HEAD)
    kept = (heads[:, None] < tl.where(slot >= 0, KV_HEADS, 0)) & (inside[None, :] < HEAD)
    source = heads[:, None] * HEAD + inside[None, :]
    keys = tl.load(key + token * key_stride + source, mask=kept, other=0.0)
    values = tl.load(value + token * value_stride + source, mask=kept, other=0.0)
    if QUANTIZED:
        keys = quantized(keys, tl.load(key_scale), cache.dtype.element_ty, EMULATED)
        values = quantized(values, tl.load(value_scale), cache.dtype.element_ty, EMULATED)
    page = (slot // BLOCK) * KV_HEADS + heads
    place = page[:, None] * (2 * BLOCK * HEAD) + (slot % BLOCK) * HEAD + inside[None, :]
    tl.store(cache + place, keys, mask=kept)
    tl.store(cache + place + BLOCK * HEAD, values, mask=kept)
