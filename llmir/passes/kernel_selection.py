"""Which kernel variants a layer gets, their tile sizes, and the run-time conditions that choose among them."""

from __future__ import annotations

from typing import Any

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention import FusedAttention, LatentAttention, PagedAttention, signature_of
from llmir.ir.attributes import Selection
from llmir.ir.bindings import ir
from llmir.ir.module import ops_of, retype_caches
from llmir.ir.remarks import Remark, add_remark, of_layers
from llmir.ir.signature import AttentionSignature, KernelVariant, StepPolicy, Variants
from llmir.ir.types import PagedKVCache
from llmir.passes.kernel_model import KernelModel
from llmir.passes.kernels_of_target import kernel_model
from llmir.target import Target


class KernelSelection:
    """Decides the cache's layout, and gives every attention op its variants and run-time conditions."""

    name = "kernel-selection"

    def __init__(self, target: Target):
        self.kernels: KernelModel[Any] = kernel_model(target)

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        isa = self.kernels.target.isa
        for op in ops_of(module, LatentAttention):
            raise UnsupportedLayerError(op.layer.value, "latent attention (MLA) has no kernel")
        attention = ops_of(module, FusedAttention, PagedAttention)
        for op in attention:
            self.kernels.check(op.layer.value, signature_of(op))
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
        return cache.replace(layout=self.kernels.layout(cache.element_type, cache.block_size))

    def _select(self, signature: AttentionSignature) -> tuple[Variants, StepPolicy]:
        decode = self.kernels.decode(signature)
        return (decode, self.kernels.prefill(signature)), self.kernels.policy(signature, decode)

    def _remark(
        self,
        signature: AttentionSignature,
        layers: list[str],
        variants: tuple[KernelVariant, ...],
        policy: StepPolicy,
    ) -> Remark:
        kernels = self.kernels
        decode, prefill = variants
        split_us = kernels.split_seconds(signature) * 1e6
        most = policy.decode_tokens
        return Remark(
            pass_name=self.name,
            subject=of_layers(layers),
            decision=f"{kernels.describe(decode)}; {kernels.describe(prefill)}; pages in layout {signature.layout!r}",
            reason=(
                f"a request of up to {most} new token{'s' if most > 1 else ''} uses decode, others prefill; a cache is "
                f"split into parts of {policy.split_keys} keys while a step has under {policy.items_per_thread} items "
                f"a thread, because a split costs {split_us:.2f} us of its own"
            ),
            numbers={
                "instruction_set": kernels.target.isa,
                **kernels.numbers(signature, decode, prefill),
                "split_us": split_us,
                "split_keys": policy.split_keys,
                "prefill_rows": prefill.max_tokens * signature.queries_per_kv,
                "figures": kernels.figures.origin,
            },
            alternatives=kernels.alternatives(signature, prefill),
        )
