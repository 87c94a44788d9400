"""Tile sizes of the attention kernel on a CPU: how many rows, keys and outputs stay in registers."""

from __future__ import annotations

import math

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import Layout, packed_layout
from llmir.ir.kernel_spec import CpuVariant
from llmir.targets.registry import lanes_of
from llmir.targets.x86.isa import INSTRUCTION_SETS, SUMS_IN_FLIGHT

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
#: Bytes of keys, or of values, in a piece, where the output does not stay in registers whole: decode reads a piece,
#: and asks for the next meanwhile. Zen 3 waits for few lines at a time and drops what is asked for beyond, and what was
#: asked for long ago has left the first-level cache. Decode of 9/3 x 64 and 32/8 x 128 heads read 1.05 to 1.17 times
#: as fast in such pieces as in whole chunks of 16 to 64 KB; with half and twice the bytes it was within 3 %.
PIECE_BYTES = 8 << 10
#: Gathered keys and values of one chunk of a "row" cache, in bytes: about a first-level cache, and a small part of any
#: second-level one. Decode from blocks of one token (Zen 5, head size 128) took 1.56 times as long as from blocks of
#: 128, with 64 KB 1.68 times; prefill takes 1.03 times as long with either.
STAGED_BYTES = 32 << 10
#: Keys ahead whose rows are asked for while a "row" cache is gathered: with 0, 8, 16 and 32 the same decode took
#: 2.0, 1.7, 1.5 and 1.6 times as long.
ROWS_AHEAD = 16
#: Gathering a byte costs as much as so many float32 operations: 57-67 GB/s on Zen 5, which does 255 GFLOP/s.
GATHER_FLOPS = 4
#: Vectors of output a decode row keeps: a whole line of values at a time keeps the reads strictly forward, and
#: was 10 % faster at head size 128 than half lines (Zen 5, AVX512_BF16).
DECODE_VALUE_VECTORS = 8
#: With fewer registers than this, whole lines would leave too few rows, and every key and value would be widened again
#: for each tile of them: 4 rows x 2 vectors took 0.83 to 0.87 of the time of 2 x 4 (Zen 3, 32/8 heads of 128).
WHOLE_LINE_REGISTERS = 32


def layout(isa: str, dtype: str, block_size: int) -> Layout:
    """Arrangement of a page: as the products read it, where a block holds whole vectors, else rows."""
    if block_size % lanes_of(isa):
        return "row"
    return packed_layout(dtype)


def registers(rows: int, vectors: int) -> int:
    """Registers a tile needs: its sums, one vector of operands a column, one broadcast.

    Where pairs are widened there are more operands, which are made one half after the other: prefill of 6 rows x 2
    vectors took 0.94 to 0.98 of the time of 4 x 2 on Zen 3 all the same.
    """
    return rows * vectors + vectors + 1


def fits(isa: str, rows: int, vectors: int) -> bool:
    """Whether a tile stays in registers."""
    instructions = INSTRUCTION_SETS[isa]
    return registers(rows, vectors) <= instructions.registers and rows * vectors <= instructions.accumulators


def loads_per_product(rows: int, vectors: int) -> float:
    """Operands loaded for each vector product of a tile: less is better."""
    return (rows + vectors) / (rows * vectors)


def balanced(total: int, most: int) -> int:
    """``total`` in equal tiles of at most ``most``: 8 rows are 4 + 4, not 6 + 2, which would pad to 6 + 6."""
    return math.ceil(total / math.ceil(total / most))


def key_chunk(attention: AttentionSpec, isa: str, most: int) -> int:
    """Keys between two softmax steps, up to ``most``: whole blocks, or of a larger block the most whole key groups
    that divide it.

    Of a "row" cache, the most whose gathered keys and values are STAGED_BYTES or less, as a power of two of groups.
    """
    s, group = attention, attention.cache.key_group(lanes_of(isa))
    if s.cache.layout != "row":
        if s.cache.block_size <= most:
            return most // s.cache.block_size * s.cache.block_size
        return max(keys for keys in range(group, max(most, group) + 1, group) if s.cache.block_size % keys == 0)
    fitting = min(most, STAGED_BYTES // s.cache.token_head_bytes)
    return group * 2 ** int(math.log2(max(1, fitting // group)))


def key_vectors(attention: AttentionSpec, isa: str, rows: int, chunk: int) -> int:
    """Vectors of scores a row keeps: the most whole key groups that divide a chunk and fit; one group at least.

    They divide what of a chunk lies in one page, or are several pages.
    """
    lanes, group = lanes_of(isa), attention.cache.key_group(lanes_of(isa))
    page = chunk if attention.cache.layout == "row" else min(chunk, attention.cache.block_size)
    tiles = [
        tile
        for tile in range(group, MOST_VECTORS * lanes + 1, group)
        if chunk % tile == 0 and (page % tile == 0 or tile % page == 0)
    ]
    return max(tile // lanes for tile in tiles if tile == group or fits(isa, rows, tile // lanes))


def value_vectors(attention: AttentionSpec, isa: str, rows: int, most: int) -> int:
    """Vectors of output a row keeps: the head in equal parts, each at most ``most`` and fitting.

    Where equal parts would be less than half of what fits, or too few to keep the multipliers busy, the last one is
    smaller: 3 + 2 of 5, not five times 1.
    """
    head_vectors = math.ceil(attention.value_size / lanes_of(isa))
    fitting = max(v for v in range(1, most + 1) if v == 1 or fits(isa, rows, v))
    equal = max(v for v in range(1, fitting + 1) if head_vectors % v == 0)
    enough = min(fitting, math.ceil(SUMS_IN_FLIGHT / rows))
    return equal if 2 * equal >= min(fitting, head_vectors) and equal >= enough else balanced(head_vectors, fitting)


def keys_ahead(attention: AttentionSpec, chunk: int, one_pass: bool) -> int:
    """Keys of a piece, which is how far ahead memory is asked for.

    Where the output takes one pass over the values (``one_pass``), reading is forward whatever the pieces: they are
    what of a chunk lies in one page. On Zen 5, against asking for the first 16 lines of the next chunk, decode from
    blocks of 128 took 0.87-0.95 times as long so; from blocks of 16, 32 and 64 tokens it takes 0.9-1.1, 0.9-1.0 and
    0.9-1.0 times as long as from blocks of 128 on two threads, and on one 1.1-1.3, 0.9-1.2 and 0.9-1.0.
    """
    if attention.cache.layout == "row":
        return ROWS_AHEAD
    return chunk if one_pass else PIECE_BYTES // attention.cache.key_bytes


def prefill_tokens(queries_per_kv: int) -> int:
    """Query tokens of a prefill item."""
    return max(1, PREFILL_ROWS // queries_per_kv)


def decode_variant(attention: AttentionSpec, isa: str) -> CpuVariant:
    """One token a request: all query heads of a KV head against keys and values read strictly forward."""
    instructions, keys = INSTRUCTION_SETS[isa], attention.cache.key_group(lanes_of(isa)) // lanes_of(isa)
    if instructions.registers >= WHOLE_LINE_REGISTERS:
        most_values = balanced(math.ceil(attention.value_size / instructions.lanes), DECODE_VALUE_VECTORS)
        most_rows = min(MOST_ROWS, instructions.accumulators // most_values)
    else:
        most_values = MOST_VECTORS
        most_rows = max(r for r in range(1, MOST_ROWS + 1) if r == 1 or fits(isa, r, keys))
    rows = balanced(attention.queries_per_kv, most_rows)
    chunk, values = key_chunk(attention, isa, DECODE_KEYS), value_vectors(attention, isa, rows, most_values)
    return CpuVariant(
        name="decode",
        max_tokens=1,
        row_tile=rows,
        key_chunk=chunk,
        key_vectors=keys,
        value_vectors=values,
        prefetch=keys_ahead(attention, chunk, one_pass=values * instructions.lanes >= attention.value_size),
    )


def prefill_variant(attention: AttentionSpec, isa: str) -> CpuVariant:
    """Many tokens a request: a register tile of a matrix product.

    Its memory is asked for a whole piece ahead: against not asking, prefill of a few tokens after 4096 others took
    0.6-0.9 times as long (Zen 5), of whole prompts 0.95-1.02.
    """
    keys = key_chunk(attention, isa, PREFILL_KEYS)
    return CpuVariant(
        name="prefill",
        max_tokens=prefill_tokens(attention.queries_per_kv),
        row_tile=MOST_ROWS,
        key_chunk=keys,
        key_vectors=key_vectors(attention, isa, MOST_ROWS, keys),
        value_vectors=value_vectors(attention, isa, MOST_ROWS, MOST_VECTORS),
        prefetch=keys_ahead(attention, keys, one_pass=True),
    )
