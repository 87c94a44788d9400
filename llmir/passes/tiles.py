"""Tile sizes of the attention kernel on a CPU: how many rows, keys and outputs stay in registers."""

from __future__ import annotations

import math

from llmir.ir.signature import LANES, AttentionSignature, CacheLayout, Isa, KernelVariant

#: Vector registers of an instruction set.
REGISTERS = {"avx512_bf16": 32, "avx512": 32, "plain": 16}
#: Registers that may hold sums: the others hold operands and what the compiler needs for addresses and masks.
ACCUMULATORS = {"avx512_bf16": 24, "avx512": 24, "plain": 12}
#: Rows in registers: with 6 x 4 sums a product loads 10 operands for 24 results, and 204-219 of 236 GFLOP/s were
#: measured on Zen 4; taller tiles spill.
MOST_ROWS = 6
MOST_VECTORS = 4
#: Keys between two softmax steps of decode: at 128 a step reads 21-22 GB/s on Zen 5 where 64 keys read 18-20.
DECODE_KEYS = 128
#: Keys between two softmax steps of prefill, where a chunk is read again by every row tile from the L1 cache.
PREFILL_KEYS = 128
#: A softmax step costs as much as the products of so many keys: prefill on Zen 5 ran at 294, 330, 341 and 355
#: GFLOP/s with chunks of 32, 64, 128 and 256 keys.
SOFTMAX_KEYS = 8
#: Query rows of a prefill item: each key and value read serves this many rows.
PREFILL_ROWS = 96
#: Cache lines of the next chunk's keys, and of its values, that decode asks for ahead. With both cores of a Zen 5
#: reading, 8 and 16 were 3-5 % faster than asking for whole chunks, 32 was not.
DECODE_PREFETCH = 16
#: Vectors of output a decode row keeps: a whole line of values at a time keeps the reads strictly forward, and
#: was 10 % faster at head size 128 than half lines. With 16 registers too few rows would be left.
DECODE_MOST_VALUE_VECTORS = {"avx512_bf16": 8, "avx512": 8, "plain": 4}


def layout(isa: str, element_type: str) -> CacheLayout:
    """Arrangement of a page: pairs where the machine multiplies bf16 pairs, else one key a lane."""
    return "pair" if (isa, element_type) == ("avx512_bf16", "bf16") else "lane"


def registers(rows: int, vectors: int) -> int:
    """Registers a tile needs: its sums, one vector of operands a column, one broadcast."""
    return rows * vectors + vectors + 1


def fits(isa: str, rows: int, vectors: int) -> bool:
    """Whether a tile stays in registers."""
    return registers(rows, vectors) <= REGISTERS[isa] and rows * vectors <= ACCUMULATORS[isa]


def loads_per_product(rows: int, vectors: int) -> float:
    """Operands loaded for each vector product of a tile: less is better."""
    return (rows + vectors) / (rows * vectors)


def balanced(total: int, most: int) -> int:
    """``total`` in equal tiles of at most ``most``: 8 rows are 4 + 4, not 6 + 2, which would pad to 6 + 6."""
    return math.ceil(total / math.ceil(total / most))


def key_chunk(block_size: int, group: int, most: int) -> int:
    """Keys between two softmax steps: the most whole key groups up to ``most`` that divide a block."""
    return max(keys for keys in range(group, max(most, group) + 1, group) if block_size % keys == 0)


def key_vectors(isa: str, rows: int, keys: int, group: int) -> int:
    """Vectors of scores a row keeps: the most whole key groups that divide a chunk and fit; one group at least."""
    lanes = LANES[isa]
    tiles = [tile for tile in range(group, MOST_VECTORS * lanes + 1, group) if keys % tile == 0]
    return max(tile // lanes for tile in tiles if tile == group or fits(isa, rows, tile // lanes))


def value_vectors(isa: str, rows: int, head_size: int, most: int) -> int:
    """Vectors of output a row keeps: the head in equal parts, each at most ``most`` and fitting."""
    fitting = max(v for v in range(1, most + 1) if v == 1 or fits(isa, rows, v))
    return balanced(head_size // LANES[isa], fitting)


def decode_variant(signature: AttentionSignature, isa: Isa) -> KernelVariant:
    """One token a request: all query heads of a KV head against keys and values read strictly forward."""
    head_vectors = signature.head_size // LANES[isa]
    values = balanced(head_vectors, DECODE_MOST_VALUE_VECTORS[isa])
    rows = balanced(signature.queries_per_kv, max(1, min(MOST_ROWS, ACCUMULATORS[isa] // values)))
    group = signature.key_group(isa)
    return KernelVariant(
        name="decode",
        max_tokens=1,
        row_tile=rows,
        key_chunk=key_chunk(signature.block_size, group, DECODE_KEYS),
        key_vectors=group // LANES[isa],
        value_vectors=value_vectors(isa, rows, signature.head_size, values),
        prefetch=DECODE_PREFETCH,
    )


def prefill_variant(signature: AttentionSignature, isa: Isa) -> KernelVariant:
    """Many tokens a request: a register tile of a matrix product."""
    group = signature.key_group(isa)
    keys = key_chunk(signature.block_size, group, PREFILL_KEYS)
    return KernelVariant(
        name="prefill",
        max_tokens=max(1, PREFILL_ROWS // signature.queries_per_kv),
        row_tile=MOST_ROWS,
        key_chunk=keys,
        key_vectors=key_vectors(isa, MOST_ROWS, keys, group),
        value_vectors=value_vectors(isa, MOST_ROWS, signature.head_size, MOST_VECTORS),
        prefetch=0,
    )
