"""Tile sizes of the attention kernel on a GPU: rows, keys, warps, and how many tiles of keys are on their way."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.ir.kernel_spec import GpuVariant, padded
from llmir.targets.gpu.architectures import chip_of
from llmir.targets.gpu.chip import LEAST_ROWS, Tile

#: Registers and shared memory decide, as Triton 3.7.1 reports them; no tile has been timed. At head size 128 on sm_90 a
#: thread has 227 to 255 registers and spills none, and a thread block takes 128 KB.
PREFILL = Tile(128, 64, 8, 3)
#: Few rows: what counts is that much of the cache is on its way. 70 KB of shared memory and 120 registers at head size
#: 128 let an SM hold three thread blocks.
DECODE = Tile(LEAST_ROWS, 64, 4, 3)
#: A tile of decode with so many rows is worked on like one of prefill: Hopper's and Blackwell's products have 64.
MANY_ROWS = 64


def shared_bytes(attention: AttentionSpec, variant: GpuVariant, isa: str) -> int:
    """About the shared memory of a thread block: queries, tiles of keys and of values on their way, probabilities.

    Triton takes exactly so much for decode, and up to 1.3 times as much for prefill on Hopper and Blackwell, where it
    copies a tile once more.
    """
    head, rows, keys = padded(attention.head_size), variant.row_tile, variant.key_chunk
    element = DTYPES[attention.dtype].bytes_of(1)
    tiles = max(1, variant.stages - 1) * keys * head * attention.cache.token_head_bytes // attention.head_size
    queries = 0 if chip_of(isa).queries_in_registers else rows * head * element
    return queries + tiles + rows * keys * element


def decode_variant(attention: AttentionSpec, isa: str) -> GpuVariant:
    """A token or a few of one request: the query heads of a KV head, padded to a tile."""
    rows = padded(attention.queries_per_kv)
    if rows >= MANY_ROWS:
        return _variant("decode", _prefill_tile(attention, isa)._replace(rows=rows), attention.queries_per_kv)
    tile = chip_of(isa).decode.get(padded(attention.head_size), DECODE)
    warps = tile.warps * max(rows, LEAST_ROWS) // LEAST_ROWS
    return _variant("decode", tile._replace(warps=warps), attention.queries_per_kv)


def prefill_variant(attention: AttentionSpec, isa: str) -> GpuVariant:
    """Many tokens: as many rows as there are registers for."""
    return _variant("prefill", _prefill_tile(attention, isa), attention.queries_per_kv)


def _prefill_tile(attention: AttentionSpec, isa: str) -> Tile:
    return chip_of(isa).prefill.get(padded(attention.head_size), PREFILL)


def _variant(name: Literal["decode", "prefill"], tile: Tile, queries_per_kv: int) -> GpuVariant:
    """``tile``, with rows for all query heads of a KV head."""
    tile = tile._replace(rows=max(tile.rows, padded(queries_per_kv)))
    return GpuVariant(
        name=name,
        max_tokens=tile.rows // queries_per_kv,
        row_tile=tile.rows,
        key_chunk=tile.keys,
        warps=tile.warps,
        stages=tile.stages,
    )


def resized(variant: GpuVariant, rows: int, keys: int, queries_per_kv: int) -> GpuVariant:
    """``variant`` with another tile."""
    return replace(variant, row_tile=rows, key_chunk=keys, max_tokens=max(1, rows // queries_per_kv))
