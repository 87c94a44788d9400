"""Which kernel variants a layer gets, their tile sizes, and the run-time conditions that choose among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention import FusedAttention, LatentAttention, PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.attributes import Selection
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import KernelVariant, StepPolicy, Variants
from llmir.ir.module import ops_of, reformat_caches
from llmir.ir.remarks import Remark, add_remark, of_layers
from llmir.targets.kernel_model import KernelModel
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model


class KernelSelection:
    """Decides the cache's layout, and gives every attention op its variants and run-time conditions."""

    name = "kernel-selection"

    def __init__(self, target: Target):
        self.kernels: KernelModel[Any] = kernel_model(target)

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        isa = self.kernels.target.isa
        for op in ops_of(module, LatentAttention):
            raise UnsupportedLayerError(op.layer.value, "latent attention (MLA) has no kernel")
        ops = ops_of(module, FusedAttention, PagedAttention)
        for op in ops:
            self.kernels.check(op.layer.value, spec_of(op))
        reformat_caches(module, self._laid_out)
        layers: dict[AttentionSpec, list[str]] = {}
        for op in ops:
            layers.setdefault(spec_of(op), []).append(op.layer.value)
        chosen = {attention: self._select(attention) for attention in layers}
        for op in ops:
            variants, policy = chosen[spec_of(op)]
            op.attributes["selection"] = Selection.build(isa=isa, variants=variants, policy=policy)
        for attention, names in layers.items():
            add_remark(module, self._remark(attention, names, *chosen[attention]))

    def _laid_out(self, _layer: str, cache: CacheFormat) -> CacheFormat:
        return replace(cache, layout=self.kernels.layout(cache.dtype, cache.block_size))

    def _select(self, attention: AttentionSpec) -> tuple[Variants, StepPolicy]:
        decode = self.kernels.decode(attention)
        return (decode, self.kernels.prefill(attention)), self.kernels.policy(attention, decode)

    def _remark(
        self,
        attention: AttentionSpec,
        layers: list[str],
        variants: tuple[KernelVariant, ...],
        policy: StepPolicy,
    ) -> Remark:
        kernels = self.kernels
        decode, prefill = variants
        split_us = kernels.split_seconds(attention) * 1e6
        most, layout = policy.decode_tokens, attention.cache.layout
        return Remark(
            pass_name=self.name,
            subject=of_layers(layers),
            decision=f"{kernels.describe(decode)}; {kernels.describe(prefill)}; pages in layout {layout!r}",
            reason=(
                f"a request of up to {most} new token{'s' if most > 1 else ''} uses decode, others prefill; a cache is "
                f"split into parts of {policy.split_keys} keys while a step has under {policy.items_per_thread} items "
                f"a thread, because a split costs {split_us:.2f} us of its own"
            ),
            numbers={
                "instruction_set": kernels.target.isa,
                **kernels.numbers(attention, decode, prefill),
                "split_us": split_us,
                "split_keys": policy.split_keys,
                "prefill_rows": prefill.max_tokens * attention.queries_per_kv,
                "figures": kernels.figures.origin,
            },
            alternatives=kernels.alternatives(attention, prefill),
        )
