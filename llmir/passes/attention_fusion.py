"""append_kv and paged_attention of a layer become one call.

Both lie inside the framework's attention layer, so one call can do both: on a CPU one kernel, on a GPU kernels that
are launched one after the other. Rotary embedding and the projections lie outside of it, where the framework calls its
own code: the fusion ends there.
"""

from __future__ import annotations

from typing import Any

from llmir.ir import build
from llmir.ir.attention import AppendKV, PagedAttention
from llmir.ir.bindings import ir, rewrite
from llmir.ir.module import ops_of
from llmir.ir.remarks import Remark, add_remark
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model


def append_of(op: PagedAttention) -> AppendKV | None:
    """The append_kv that ``op`` can take in: of the same layer, and its cache is seen by nothing before ``op``."""
    owner = op.cache.owner
    if isinstance(owner, ir.Block) or not isinstance(owner.opview, AppendKV):
        return None
    append = owner.opview
    earlier = [
        use.owner
        for use in append.new_cache.uses
        if use.owner.operation != op.operation and not op.operation.is_before_in_block(use.owner.operation)
    ]
    return append if append.layer == op.layer and not earlier else None


def fuse(op: PagedAttention, rewriter: Any) -> bool | None:
    """append_kv, then paged_attention: one fused_attention in the latter's place."""
    append = append_of(op)
    if append is None:
        return True  # no match
    with rewriter.ip, op.location:
        fused = build.fused_attention(append, op)
    rewriter.replace_op(op, [fused.result])
    append.new_cache.replace_all_uses_with(fused.new_cache)
    rewriter.erase_op(append)
    return None


class AttentionFusion:
    """Fuses append_kv into the attention that reads it, layer by layer."""

    name = "attention-fusion"

    def __init__(self, target: Target):
        self.target = target

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        layers = [op.layer.value for op in ops_of(module, PagedAttention)]
        patterns = rewrite.RewritePatternSet()
        patterns.add(PagedAttention, fuse)
        rewrite.walk_and_apply_patterns(module, patterns.freeze())
        left = {op.layer.value for op in ops_of(module, PagedAttention)}
        add_remark(module, self._remark(layers, sorted(left)))

    def _remark(self, layers: list[str], left: list[str]) -> Remark:
        fused = len(layers) - len(left)
        starts_saved = fused * kernel_model(self.target).calls_saved_by_fusion
        saved = starts_saved * self.target.figures.fork_join_seconds
        if starts_saved:
            why = f"{fused} fewer kernel calls a step, each of which starts the threads once: {saved * 1e6:.0f} us"
        else:
            why = f"{fused} fewer calls of the framework a step; kernels are launched one by one, so no launch is saved"
        return Remark(
            pass_name=self.name,
            subject=f"{len(layers)} attention layers",
            decision=f"append and attention in one call in {fused} of them",
            reason=why,
            numbers={
                "fused_layers": fused,
                "unfused_layers": left,
                "calls_before": 2 * fused + len(left),
                "calls_after": len(layers),
                "fork_join_us": self.target.figures.fork_join_seconds * 1e6,
                "saved_us_per_step": saved * 1e6,
                "figures": self.target.figures.origin,
            },
            alternatives=[
                {"fusion": "append and attention apart", "calls": 2 * fused + len(left), "saved_us_per_step": 0.0},
                {
                    "fusion": "rotary embedding too",
                    "calls": len(layers),
                    "not_chosen": "the framework applies it outside its attention layer",
                },
            ],
        )
