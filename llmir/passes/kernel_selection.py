"""Which kernel variants a layer gets, their tile sizes, and the run-time conditions that choose among them."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention import FusedAttention, LatentAttention, PagedAttention, signature_of
from llmir.ir.attributes import Selection
from llmir.ir.bindings import ir
from llmir.ir.module import ops_of, retype_caches
from llmir.ir.remarks import Remark, add_remark, of_layers
from llmir.ir.signature import (
    HEAD_SIZES,
    LANES,
    AttentionSignature,
    CpuVariant,
    Isa,
    StepPolicy,
    is_gpu,
)
from llmir.ir.types import PagedKVCache
from llmir.passes import tiles
from llmir.target import Measurements, Target

#: A split's own cost may be this part of its reading.
SPLIT_OVERHEAD = 1 / 8
#: Work is dealt item by item, so with n items a thread others wait for at most about 1/n of a step.
ITEMS_PER_THREAD = 4


def check_supported(layer: str, signature: AttentionSignature, isa: Isa) -> None:
    """Raise UnsupportedLayerError for a signature that the kernel generators cannot make for ``isa``."""
    s = signature
    if s.sinks and not is_gpu(isa):
        raise UnsupportedLayerError(layer, "attention sinks have no kernel on a CPU")
    if s.quantized and not is_gpu(isa):
        raise UnsupportedLayerError(layer, f"a KV cache of {s.cache_type} has no kernel on a CPU")
    if s.head_size not in HEAD_SIZES:
        known = ", ".join(map(str, HEAD_SIZES))
        raise UnsupportedLayerError(layer, f"its head size is {s.head_size}, and there are kernels for {known}")
    if s.num_heads % s.num_kv_heads:
        raise UnsupportedLayerError(layer, f"{s.num_heads} query heads do not share {s.num_kv_heads} KV heads evenly")


def split_seconds(signature: AttentionSignature, isa: Isa, figures: Measurements) -> float:
    """What one more split costs: its rows' states written and read once, and one random access to begin at."""
    state_bytes = 4 * signature.queries_per_kv * (2 * LANES[isa] + signature.head_size)
    piece, rate = figures.piece_bandwidth[0]
    access = figures.threads * max(0.0, piece / rate - piece / figures.read_bandwidth_all)
    return 2 * state_bytes / figures.read_bandwidth + access


def step_policy(signature: AttentionSignature, isa: Isa, decode: CpuVariant, figures: Measurements) -> StepPolicy:
    """The run-time conditions: a split is so long that its own cost is at most SPLIT_OVERHEAD of its reading."""
    key_seconds = signature.key_bytes / figures.read_bandwidth
    keys = split_seconds(signature, isa, figures) / SPLIT_OVERHEAD / key_seconds
    return StepPolicy(
        decode_tokens=decode.max_tokens,
        split_keys=math.ceil(keys / decode.key_chunk) * decode.key_chunk,
        items_per_thread=ITEMS_PER_THREAD,
    )


class KernelSelection:
    """Decides the cache's layout, and gives every attention op its variants and run-time conditions."""

    name = "kernel-selection"

    def __init__(self, target: Target):
        self.target = target

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        isa = self.target.isa
        for op in ops_of(module, LatentAttention):
            raise UnsupportedLayerError(op.layer.value, "latent attention (MLA) has no kernel")
        attention = ops_of(module, FusedAttention, PagedAttention)
        for op in attention:
            check_supported(op.layer.value, signature_of(op), isa)
        retype_caches(module, self._laid_out)
        layers: dict[AttentionSignature, list[str]] = {}
        for op in attention:
            layers.setdefault(signature_of(op), []).append(op.layer.value)
        chosen = {signature: self._select(signature) for signature in layers}
        for op in attention:
            variants, policy = chosen[signature_of(op)]
            op.attributes["selection"] = Selection.build(isa=isa, variants=variants, policy=policy)
        for signature, names in layers.items():
            add_remark(module, self._remark(signature, names, *chosen[signature]))

    def _laid_out(self, _layer: str, cache: PagedKVCache) -> PagedKVCache:
        return cache.replace(layout=tiles.layout(self.target.isa, cache.element_type, cache.block_size))

    def _select(self, signature: AttentionSignature) -> tuple[tuple[CpuVariant, ...], StepPolicy]:
        isa = self.target.isa
        decode = tiles.decode_variant(signature, isa)
        policy = step_policy(signature, isa, decode, self.target.figures)
        return (decode, tiles.prefill_variant(signature, isa)), policy

    def _remark(
        self,
        signature: AttentionSignature,
        layers: list[str],
        variants: tuple[CpuVariant, ...],
        policy: StepPolicy,
    ) -> Remark:
        isa, figures = self.target.isa, self.target.figures
        decode, prefill = variants
        flops_per_key = 4 * signature.queries_per_kv * signature.head_size
        rate = figures.bf16_rate if tiles.multiplies_pairs(isa, signature.element_type) else figures.f32_rate
        return Remark(
            pass_name=self.name,
            subject=of_layers(layers),
            decision=f"{_described(decode)}; {_described(prefill)}; pages in layout {signature.layout!r}",
            reason=(
                f"a request of up to {policy.decode_tokens} new token uses decode, others prefill; a cache is split "
                f"into parts of {policy.split_keys} keys while a step has under {policy.items_per_thread} items a "
                f"thread, because a split costs {split_seconds(signature, isa, figures) * 1e6:.2f} us of its own"
            ),
            numbers={
                "instruction_set": isa,
                "decode_registers": _registers(decode),
                "prefill_registers": _registers(prefill),
                "registers": tiles.REGISTERS[isa],
                "prefill_loads_per_product": tiles.loads_per_product(prefill.row_tile, prefill.key_vectors),
                "decode_read_ns_per_key": signature.key_bytes / figures.read_bandwidth * 1e9,
                "decode_multiply_ns_per_key": flops_per_key / rate * 1e9,
                "split_us": split_seconds(signature, isa, figures) * 1e6,
                "split_keys": policy.split_keys,
                "prefill_rows": prefill.max_tokens * signature.queries_per_kv,
                "l1_kb": self.target.cache_bytes(1) / 1024,
                "prefill_chunk_kb": prefill.key_chunk * signature.key_bytes / 1024,
                "figures": figures.origin,
            },
            alternatives=_other_tiles(signature, isa, prefill),
        )


def _described(variant: CpuVariant) -> str:
    return (
        f"{variant.name} {variant.row_tile} rows x {variant.key_vectors} key / {variant.value_vectors} value vectors, "
        f"{variant.key_chunk} keys a chunk"
    )


def _registers(variant: CpuVariant) -> int:
    return tiles.registers(variant.row_tile, max(variant.key_vectors, variant.value_vectors))


def _other_tiles(signature: AttentionSignature, isa: Isa, prefill: CpuVariant) -> list[dict[str, Any]]:
    """Prefill tiles of other heights, each as wide as it can be."""
    others = []
    for rows in (2, 4, 6, 8, 12):
        vectors = tiles.key_vectors(signature, isa, rows, prefill.key_chunk)
        tile = replace(prefill, row_tile=rows, key_vectors=vectors)
        if tile.row_tile != prefill.row_tile:
            others.append(
                {
                    "prefill_tile": f"{rows} rows x {vectors} vectors",
                    "registers": tiles.registers(rows, vectors),
                    "loads_per_product": tiles.loads_per_product(rows, vectors),
                }
            )
    return others
