"""What passes know of the attention kernels of a GPU, which are Triton's; nothing here has been measured on one."""

from __future__ import annotations

from typing import Any

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import Layout
from llmir.ir.kernel_spec import GpuVariant, padded
from llmir.targets.gpu import tiles
from llmir.targets.kernel_model import TILE_EFFICIENCY, KernelModel

#: float32 operations that take as long as one score's part of the softmax: an exponential is as long as 16 of them
#: (16 results a cycle and SM against 128 multiply-adds: CUDA C++ Programming Guide, arithmetic throughput; on sm_80
#: it is 8), and scaling, maximum, sum and conversion are an instruction each.
SOFTMAX_FLOPS = 16 + 4 * 2
#: float32 of a row's state besides its output: maximum and sum.
STATE_STATISTICS = 2


class GpuKernels(KernelModel[GpuVariant]):
    """Tiles of tensor cores; a thread block asks for tiles of keys ahead, so their pieces are read all at once."""

    #: With two items for everybody, an SM that is done with its first while others are not has another one.
    items_per_thread = 2
    #: What it computes is hidden behind reading the states.
    merge_seconds = 0.0
    #: Append and attention are launched one after the other in any case.
    calls_saved_by_fusion = 0

    def layout(self, dtype: str, block_size: int) -> Layout:
        return "row"

    def decode(self, attention: AttentionSpec) -> GpuVariant:
        return tiles.decode_variant(attention, self.target.isa)

    def prefill(self, attention: AttentionSpec) -> GpuVariant:
        return tiles.prefill_variant(attention, self.target.isa)

    def piece_bytes(self, attention: AttentionSpec) -> int:
        """The keys of a tile that lie in one page."""
        return min(attention.cache.block_size, self.decode(attention).key_chunk) * attention.cache.key_bytes

    def gather_seconds(self, attention: AttentionSpec) -> float:
        return 0.0

    def row_key_seconds(self, attention: AttentionSpec, prefill: GpuVariant) -> float:
        """Products of the padded head, and then the softmax; that they overlap is not counted on."""
        products = 4 * padded(attention.head_size) / self.figures.bf16_rate
        return products + SOFTMAX_FLOPS / self.figures.f32_rate

    def decode_row_key_seconds(self, attention: AttentionSpec, decode: GpuVariant, prefill: GpuVariant) -> float:
        """A tile is as long as its rows padded, whichever of them are there."""
        rows = decode.max_tokens * attention.queries_per_kv
        return decode.row_tile / rows * self.row_key_seconds(attention, prefill) / TILE_EFFICIENCY

    def split_bandwidth(self) -> float:
        """An SM's share: its splits run while others' do."""
        return self.figures.read_bandwidth_all / self.figures.threads

    def split_seconds(self, attention: AttentionSpec) -> float:
        """Its rows' states written and read once, and one access to memory that nothing hides."""
        state_bytes = 4 * attention.queries_per_kv * (STATE_STATISTICS + attention.head_size)
        return 2 * state_bytes / self.split_bandwidth() + self.figures.latency_seconds

    def describe(self, variant: GpuVariant) -> str:
        return (
            f"{variant.name} {self.describe_tile(variant)}, {variant.warps} warps, {variant.stages} "
            f"stage{'s' if variant.stages > 1 else ''}"
        )

    def describe_tile(self, variant: GpuVariant) -> str:
        return f"{variant.row_tile} rows x {variant.key_chunk} keys"

    def numbers(self, attention: AttentionSpec, decode: GpuVariant, prefill: GpuVariant) -> dict[str, Any]:
        row_key = self.row_key_seconds(attention, prefill)
        return {
            "decode_tiles_kb": self._shared_bytes(attention, decode) / 1024,
            "prefill_tiles_kb": self._shared_bytes(attention, prefill) / 1024,
            "shared_memory_kb": self.target.shared_memory / 1024,
            "decode_rows_used": f"{decode.max_tokens * attention.queries_per_kv} of {decode.row_tile}",
            "prefill_rows_used": f"{prefill.max_tokens * attention.queries_per_kv} of {prefill.row_tile}",
            "decode_read_ns_per_key": attention.cache.token_head_bytes / self.split_bandwidth() * 1e9,
            "decode_multiply_ns_per_key": decode.row_tile * row_key * 1e9,
            "prefill_multiply_ns_per_key": prefill.row_tile * row_key * 1e9,
        }

    def _shared_bytes(self, attention: AttentionSpec, variant: GpuVariant) -> int:
        return tiles.shared_bytes(attention, variant, self.target.isa)

    def alternatives(self, attention: AttentionSpec, prefill: GpuVariant) -> list[dict[str, Any]]:
        """Tiles of other sizes, and how often each key is read for a prompt's rows."""
        others, read = [], attention.cache.token_head_bytes / self.split_bandwidth() * 1e9
        for rows, keys in ((64, 64), (128, 32), (128, 64), (128, 128)):
            tile = tiles.resized(prefill, rows, keys, attention.queries_per_kv)
            if tile != prefill and tile.max_tokens * attention.queries_per_kv <= rows:
                others.append(
                    {
                        "prefill_tile": self.describe_tile(tile),
                        "tiles_kb": self._shared_bytes(attention, tile) / 1024,
                        "read_ns_per_row_and_key": read / rows,
                    }
                )
        return others

    def reading(self, attention: AttentionSpec) -> dict[str, Any]:
        """Little's law: as long as so much is on its way, memory streams, in whatever pieces."""
        decode = self.decode(attention)
        needed = self.figures.read_bandwidth_all * self.figures.latency_seconds / self.figures.threads
        return {
            "kb_on_their_way_to_a_thread_block": max(1, decode.stages - 1)
            * decode.key_chunk
            * attention.cache.token_head_bytes
            / 1024,
            "kb_that_hide_the_latency": needed / 1024,
        }
