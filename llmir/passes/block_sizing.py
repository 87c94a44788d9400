"""How many tokens a block of the KV cache holds: the smallest size of about the least time per decode step.

Costs pull in two directions. Small blocks waste less: fewer slots of a request's last block lie empty, and less
of a shared prefix is computed again because a prefix cache keeps whole blocks alone. Blocks smaller than a
chunk of keys (a KernelModel's) are read in smaller contiguous pieces, and may take more softmax steps in prefill; on a
CPU, blocks that do not hold whole vectors of keys are gathered row by row first. Where so much memory is on its way
that pieces of any size stream, as on GPUs, only the first kind of cost is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llmir.costs.block import FIGURES_ERROR, BlockCost, block_cost, cheapest
from llmir.costs.model import ModelCost
from llmir.errors import LlmirError
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.bindings import ir
from llmir.ir.module import model_info, ops_of, reformat_caches
from llmir.ir.remarks import Remark, add_remark
from llmir.targets.kernel_model import KernelModel
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model
from llmir.workload import Workload


class BlockSizing:
    """Gives every KV cache of the module the :func:`cheapest` block size, unless the user has set one."""

    name = "block-sizing"

    def __init__(self, target: Target, workload: Workload):
        self.target = target
        self.workload = workload
        self.kernels: KernelModel[Any] = kernel_model(target)
        self.error = max(FIGURES_ERROR, target.figures.error)

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        info = model_info(module)
        layers = {op.layer.value: spec_of(op) for op in ops_of(module, PagedAttention)}
        if not layers:
            raise LlmirError(f"{info.model} has no attention over a paged KV cache: there is nothing to compile")
        for layer, spec in layers.items():
            self.kernels.check(layer, spec)
        specs = list(layers.values())
        current = specs[0].cache.block_size
        candidates = [size for size in info.allowed_block_sizes if size > 0]
        if info.block_size_fixed:
            candidates = sorted({current, *candidates})
        if not candidates:
            allowed = ", ".join(map(str, info.allowed_block_sizes)) or "none"
            raise LlmirError(f"no block size that {info.framework} allows ({allowed}) holds a token")
        model = ModelCost.of(module, self.workload.concurrency)
        costs = [block_cost(size, specs, model, self.workload, self.target) for size in candidates]
        best = cheapest(costs, self.error)
        chosen = next(cost for cost in costs if cost.block_size == current) if info.block_size_fixed else best
        reformat_caches(module, lambda _layer, cache: replace(cache, block_size=chosen.block_size))
        reading = self.kernels.reading(self.kernels.laid_out(specs[0], chosen.block_size))
        if (weights := model.remark(self.name)) is not None:
            add_remark(module, weights)
        add_remark(module, self._remark(chosen, best, costs, reading, fixed=info.block_size_fixed))

    def _remark(
        self,
        chosen: BlockCost,
        best: BlockCost,
        costs: Sequence[BlockCost],
        reading: dict[str, Any],
        *,
        fixed: bool,
    ) -> Remark:
        why = "set by the user" if fixed else f"smallest within {self.error:.0%} of the least time"
        gathering = f"{chosen.gather_seconds * 1e6:.0f} gathering rows, " if chosen.gather_seconds else ""
        reason = (
            f"{why}: {chosen.seconds * 1e6:.0f} us per decode step of {self.workload.concurrency} requests, "
            f"{chosen.read_seconds * 1e6:.0f} of them reading pieces of "
            f"{chosen.piece_bytes / 1024:.0f} KB at {chosen.read_bandwidth / 1e9:.1f} GB/s, "
            f"{chosen.prefill_seconds * 1e6:.0f} on the prompts that begin, "
            f"{gathering}"
            f"{chosen.padding_seconds * 1e6:.0f} for {chosen.padding_share:.1%} empty slots, "
            f"{chosen.recompute_seconds * 1e6:.0f} for prefix tokens computed again"
        )
        if fixed and len(costs) > 1:
            wish = "the same" if chosen is best else f"{best.block_size} tokens ({best.seconds * 1e6:.0f} us)"
            reason += f"; llmir would have chosen {wish}"
        return Remark(
            pass_name=self.name,
            subject="KV cache",
            decision=f"{chosen.block_size} tokens a block",
            reason=reason,
            numbers={
                **chosen.numbers(),
                **reading,
                "workload": self.workload.name,
                "concurrency": self.workload.concurrency,
                "figures": self.target.figures.origin,
            },
            alternatives=[cost.numbers() for cost in costs if cost is not chosen],
        )
