"""What passes know of the attention kernels of an x86-64 CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import Layout
from llmir.ir.kernel_spec import CpuVariant
from llmir.targets.kernel_model import TILE_EFFICIENCY, KernelModel
from llmir.targets.registry import lanes_of
from llmir.targets.x86 import tiles
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: A row of decode costs as much as so many of prefill: 1.64 at 9/3 heads of 64 and at 32/8 of 128 on Zen 5.
DECODE_ROW = 1.6


class X86Kernels(KernelModel[CpuVariant]):
    """Tiles in vector registers; each thread reads one piece of memory after the other."""

    #: Work is dealt item by item, so with n items a thread others wait for at most about 1/n of a step.
    items_per_thread = 4
    #: Two exponentials, a division and some dozens of other vector operations.
    merge_seconds = 30e-9
    calls_saved_by_fusion = 1

    def layout(self, dtype: str, block_size: int) -> Layout:
        return tiles.layout(self.target.isa, dtype, block_size)

    def decode(self, attention: AttentionSpec) -> CpuVariant:
        return tiles.decode_variant(attention, self.target.isa)

    def prefill(self, attention: AttentionSpec) -> CpuVariant:
        return tiles.prefill_variant(attention, self.target.isa)

    def piece_bytes(self, attention: AttentionSpec) -> int:
        """The keys that decode reads before it goes on elsewhere: those of a piece (see CpuVariant), or of a page.

        Of a "row" cache, the rows on their way: they lie in many places, but memory is asked for all of them at once,
        as it is for the lines of a contiguous piece.
        """
        if attention.cache.layout == "row":
            keys = tiles.ROWS_AHEAD
        else:
            keys = min(attention.cache.block_size, self.decode(attention).prefetch)
        return keys * attention.cache.key_bytes

    def gather_seconds(self, attention: AttentionSpec) -> float:
        return tiles.GATHER_FLOPS / self.figures.f32_rate if attention.cache.layout == "row" else 0.0

    def row_key_seconds(self, attention: AttentionSpec, prefill: CpuVariant) -> float:
        flops = 2 * (attention.head_size + attention.value_size) * (1 + tiles.SOFTMAX_KEYS / prefill.key_chunk)
        return flops / self._rate(attention)

    def decode_row_key_seconds(self, attention: AttentionSpec, decode: CpuVariant, prefill: CpuVariant) -> float:
        return DECODE_ROW * self.row_key_seconds(attention, prefill) / TILE_EFFICIENCY

    def _rate(self, attention: AttentionSpec) -> float:
        pairs = attention.dtype == "bf16" and INSTRUCTION_SETS[self.target.isa].multiplies_pairs
        return self.figures.bf16_rate if pairs else self.figures.f32_rate

    def split_bandwidth(self) -> float:
        return self.figures.read_bandwidth

    def split_seconds(self, attention: AttentionSpec) -> float:
        """Its rows' states written and read once, and one random access to begin at."""
        state_bytes = 4 * attention.queries_per_kv * (2 * lanes_of(self.target.isa) + attention.value_size)
        piece, rate = self.figures.piece_bandwidth[0]
        access = self.figures.threads * max(0.0, piece / rate - piece / self.figures.read_bandwidth_all)
        return 2 * state_bytes / self.figures.read_bandwidth + access

    def describe(self, variant: CpuVariant) -> str:
        return (
            f"{variant.name} {variant.row_tile} rows x {variant.key_vectors} key / {variant.value_vectors} value "
            f"vectors, {variant.key_chunk} keys a chunk"
        )

    def describe_tile(self, variant: CpuVariant) -> str:
        return f"{variant.row_tile} rows x {variant.key_vectors} vectors"

    def numbers(self, attention: AttentionSpec, decode: CpuVariant, prefill: CpuVariant) -> dict[str, Any]:
        flops_per_key = 2 * attention.queries_per_kv * (attention.head_size + attention.value_size)
        return {
            "decode_registers": _registers(decode),
            "prefill_registers": _registers(prefill),
            "registers": INSTRUCTION_SETS[self.target.isa].registers,
            "prefill_loads_per_product": tiles.loads_per_product(prefill.row_tile, prefill.key_vectors),
            "decode_read_ns_per_key": attention.cache.token_head_bytes / self.figures.read_bandwidth * 1e9,
            "decode_multiply_ns_per_key": flops_per_key / self._rate(attention) * 1e9,
            "l1_kb": self.target.cache_bytes(1) / 1024,
            "prefill_chunk_kb": prefill.key_chunk * attention.cache.token_head_bytes / 1024,
        }

    def alternatives(self, attention: AttentionSpec, prefill: CpuVariant) -> list[dict[str, Any]]:
        """Tiles of other heights, each as wide as it can be."""
        others = []
        for rows in (2, 4, 6, 8, 12):
            vectors = tiles.key_vectors(attention, self.target.isa, rows, prefill.key_chunk)
            tile = replace(prefill, row_tile=rows, key_vectors=vectors)
            if tile.row_tile != prefill.row_tile:
                others.append(
                    {
                        "prefill_tile": self.describe_tile(tile),
                        "registers": tiles.registers(rows, vectors),
                        "loads_per_product": tiles.loads_per_product(rows, vectors),
                    }
                )
        return others

    def reading(self, attention: AttentionSpec) -> dict[str, Any]:
        """Each thread waits for the beginning of every piece; enough of them stream all the same."""
        piece, figures = self.piece_bytes(attention), self.figures
        one = figures.found_piece_rate(piece) / figures.threads
        return {
            "gb_per_s_of_a_thread": one / 1e9,
            "threads": figures.threads,
            "threads_that_use_the_bandwidth": figures.read_bandwidth_all / one,
        }


def _registers(variant: CpuVariant) -> int:
    return tiles.registers(variant.row_tile, max(variant.key_vectors, variant.value_vectors))
