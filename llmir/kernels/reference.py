"""The plain definition of what the kernels compute: every kernel is checked against this file.

Nothing here is fast. Attention is written once, in float64, on the logical cache
``[num_blocks, num_kv_heads, block_size, head_size]`` (keys and values apart); the layouts that kernels keep
inside a page are re-orderings of it, done by :func:`pack_pages` and undone by :func:`unpack_pages`.

numpy has no bfloat16, so bf16 arrays hold their bits as uint16.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dtypes import DTYPES
from llmir.targets.registry import lanes_of

Array = NDArray[Any]

#: Query rows that are worked on at once, so that a long prefill's float64 scores fit in memory.
_ROWS_AT_ONCE = 256


def bf16_bits(values: Array) -> NDArray[np.uint16]:
    """Round float32 ``values`` (any shape) to bfloat16, ties to even, NaN kept; returns the bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    ties_to_even = (bits >> 16) & 1
    with np.errstate(over="ignore"):
        rounded = (bits + 0x7FFF + ties_to_even) >> 16
    quiet_nan = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet_nan, rounded).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values (exact) of bfloat16 ``bits``."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def encode(values: Array, dtype: str) -> Array:
    """Round float32 ``values`` to ``dtype``; returns an array of what stores it, see dtypes.py."""
    if dtype == "bf16":
        return bf16_bits(values)
    return np.asarray(values).astype(DTYPES[dtype].storage)


def decode(stored: Array) -> NDArray[np.float64]:
    """The exact float64 values of an array as :func:`encode` returns it (uint16 is read as bf16)."""
    stored = np.asarray(stored)
    return (bf16_values(stored) if stored.dtype == np.uint16 else stored).astype(np.float64)


def relative_error(output: Array, exact: Array) -> float:
    """``|output - exact| / |exact|`` over all elements (Frobenius norm); ``output`` may be bf16 bits."""
    exact = np.asarray(exact, np.float64)
    return float(np.linalg.norm(decode(output) - exact) / np.linalg.norm(exact))


def append_kv(key: Array, value: Array, slot_mapping: Array, key_cache: Array, value_cache: Array) -> None:
    """Write new tokens into the logical cache, in place.

    ``key`` and ``value``: ``[num_tokens, num_kv_heads, head_size]``; ``slot_mapping``: ``[num_tokens]``, the
    slot ``block * block_size + offset`` of each token, negative for a token that is not kept; the caches:
    ``[num_blocks, num_kv_heads, block_size, head_size]``.
    """
    kept = np.asarray(slot_mapping) >= 0
    block, offset = np.divmod(np.asarray(slot_mapping)[kept], key_cache.shape[2])
    key_cache[block, :, offset] = key[kept]
    value_cache[block, :, offset] = value[kept]


def attention(
    query: Array,
    key_cache: Array,
    value_cache: Array,
    block_table: Array,
    seq_lens: Array,
    query_start: Array,
    spec: AttentionSpec,
    sinks: Array | None = None,
    slopes: Array | None = None,
) -> NDArray[np.float64]:
    """Attention of every new token over its request's paged KV cache, in float64.

    ``query``: ``[num_tokens, num_heads, head_size]``, the requests' new tokens one request after the other;
    ``key_cache``, ``value_cache``: ``[num_blocks, num_kv_heads, block_size, head_size]``, the new tokens
    already appended; ``block_table``: ``[num_requests, max_blocks]``, physical blocks; ``seq_lens``:
    ``[num_requests]``, tokens of each request, the new ones included; ``query_start``:
    ``[num_requests + 1]``, first row of each request in ``query``; ``sinks``: ``[num_heads]``, scores that take part
    in the softmax and have no value; ``slopes``: ``[num_heads]``, of ALiBi. Element types as :func:`encode` stores
    them; a quantized cache comes as the values it stands for. Returns ``[num_tokens, num_heads, value_size]``. Slots
    that no query may see are never read.
    """
    output = np.zeros((*query.shape[:2], value_cache.shape[-1]), np.float64)
    block_table = np.asarray(block_table)
    for request, seq_len in enumerate(int(n) for n in seq_lens):
        begin, end = int(query_start[request]), int(query_start[request + 1])
        for row in range(begin, end, _ROWS_AT_ONCE):
            rows = slice(row, min(row + _ROWS_AT_ONCE, end))
            positions = np.arange(rows.start, rows.stop) + seq_len - end
            first = max(0, int(positions[0]) - spec.mask.window + 1) if spec.mask.window else 0
            ahead = spec.mask.ahead
            seen = np.arange(first, seq_len if ahead is None else min(int(positions[-1]) + ahead + 1, seq_len))
            blocks, offsets = block_table[request, seen // spec.cache.block_size], seen % spec.cache.block_size
            keys = decode(key_cache[blocks, :, offsets])  # [keys, KV heads, head size]
            values = decode(value_cache[blocks, :, offsets])
            distances = positions[:, None] - seen[None, :]
            output[rows] = _attend(decode(query[rows]), keys, values, distances, spec, sinks, slopes)
    return output


def _visible(distances: Array, spec: AttentionSpec) -> NDArray[np.bool_]:
    """Which keys a query sees that are so many tokens before it."""
    visible = np.ones(distances.shape, bool) if spec.mask.ahead is None else distances >= -spec.mask.ahead
    return visible & (distances < spec.mask.window) if spec.mask.window else visible


def _attend(
    query: Array,
    keys: Array,
    values: Array,
    distances: Array,
    spec: AttentionSpec,
    sinks: Array | None,
    slopes: Array | None,
) -> NDArray[np.float64]:
    """Softmax attention of one request: query ``[queries, heads, head_size]``, keys ``[keys, KV heads, ...]``.

    ``distances``: tokens from a key to a query, ``[queries, keys]``.
    """
    num_new, num_heads, head_size = query.shape
    grouped = query.reshape(num_new, spec.num_kv_heads, spec.queries_per_kv, head_size)
    scores = np.einsum("qhgd,khd->hgqk", grouped, keys, optimize=True) * spec.scale
    if spec.soft_cap:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    if slopes is not None:
        scores = scores - slopes.reshape(spec.num_kv_heads, spec.queries_per_kv, 1, 1) * distances
    scores = np.where(_visible(distances, spec), scores, -np.inf)
    highest = scores.max(axis=-1, keepdims=True)
    sink_weights = 0.0
    if sinks is not None:
        sink = decode(sinks).reshape(spec.num_kv_heads, spec.queries_per_kv, 1, 1)
        highest = np.maximum(highest, sink)
        sink_weights = np.exp(sink - highest)
    weights = np.exp(scores - highest)
    weights /= weights.sum(axis=-1, keepdims=True) + sink_weights
    return np.einsum("hgqk,khd->qhgd", weights, values, optimize=True).reshape(num_new, num_heads, values.shape[-1])


def pack_pages(key_cache: Array, value_cache: Array, cache: CacheFormat, isa: str) -> Array:
    """Bring logical keys and values into the pages of ``cache.layout``, in any dtype.

    ``key_cache``, ``value_cache``: ``[num_blocks, num_kv_heads, block_size, head_size]``. Returns
    ``[num_blocks, num_kv_heads, block_size * (key size + value size)]``, contiguous.
    """
    outer, size = key_cache.shape[:2], key_cache.shape[2]
    if cache.layout == "logical":  # every slot's key with its value behind it
        return np.concatenate([key_cache, value_cache], axis=-1).reshape(*outer, -1)
    keys, values = key_cache, value_cache
    group = 1 if cache.layout == "row" else cache.key_group(lanes_of(isa))
    if cache.layout == "lane":
        keys = key_cache.reshape(*outer, size // group, group, cache.key_size).swapaxes(-1, -2)
    elif cache.layout == "pair":
        keys = key_cache.reshape(*outer, size // group, group, cache.key_size // 2, 2).swapaxes(-2, -3)
        values = value_cache.reshape(*outer, size // 2, 2, cache.value_size).swapaxes(-1, -2)
    return np.concatenate([keys.reshape(*outer, -1), values.reshape(*outer, -1)], axis=-1)


def unpack_pages(pages: Array, cache: CacheFormat, isa: str) -> tuple[Array, Array]:
    """The inverse of :func:`pack_pages`: ``(key_cache, value_cache)``."""
    outer, size, key_size, value_size = pages.shape[:2], cache.block_size, cache.key_size, cache.value_size
    if cache.layout == "logical":
        key_cache, value_cache = np.split(pages.reshape(*outer, size, key_size + value_size), [key_size], axis=-1)
        return np.ascontiguousarray(key_cache), np.ascontiguousarray(value_cache)
    keys, values = np.split(pages.reshape(*outer, -1), [size * key_size], axis=-1)
    group = 1 if cache.layout == "row" else cache.key_group(lanes_of(isa))
    if cache.layout == "lane":
        keys = keys.reshape(*outer, size // group, key_size, group).swapaxes(-1, -2)
    elif cache.layout == "pair":
        keys = keys.reshape(*outer, size // group, key_size // 2, group, 2).swapaxes(-2, -3)
        values = values.reshape(*outer, size // 2, value_size, 2).swapaxes(-1, -2)
    logical = (*outer, size)
    return (
        np.ascontiguousarray(keys.reshape(*logical, key_size)),
        np.ascontiguousarray(values.reshape(*logical, value_size)),
    )
