"""How many tokens a block of the KV cache holds: the smallest size of about the least time per decode step.

Costs pull in two directions. Small blocks waste less: fewer slots of a request's last block lie empty, and less
of a shared prefix is computed again because a prefix cache keeps whole blocks alone. Blocks smaller than a
chunk of keys (see tiles.py) are read in smaller contiguous pieces, and may take more softmax steps in prefill; on a
CPU, blocks that do not hold whole vectors of keys are gathered row by row first. Where so much memory is on its way
that pieces of any size stream, as on GPUs, only the first kind of cost is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmir.errors import LlmirError
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import model_info, ops_of, reformat_caches
from llmir.ir.remarks import Remark, add_remark
from llmir.passes.kernel_model import KernelModel
from llmir.passes.kernels_of_target import kernel_model
from llmir.passes.model_cost import ModelCost
from llmir.target import Target
from llmir.workload import Workload

#: Figures of a machine measured twice differ by so much at least, and the workload is a guess.
FIGURES_ERROR = 0.05


@dataclass(frozen=True)
class BlockCost:
    """What one block size costs a decode step of the whole batch; seconds are of all threads together."""

    block_size: int
    piece_bytes: int
    """Bytes of keys that decode reads at a time, in the layer where they are fewest."""
    read_bandwidth: float
    """Bytes a second at which the KV cache is read."""
    read_seconds: float
    prefill_seconds: float
    """Attention of the prompts that begin in a step."""
    gather_seconds: float
    """Gathering rows, in decode and in prefill; 0 in other layouts."""
    padding_share: float
    """Part of the allocated slots that hold no token."""
    padding_bytes: float
    """Bytes of those slots, all requests and layers."""
    padding_seconds: float
    recomputed_tokens: float
    """Tokens of a shared prefix that a request computes again."""
    recompute_seconds: float

    @property
    def seconds(self) -> float:
        """What the block size is chosen by."""
        attention = self.read_seconds + self.prefill_seconds + self.gather_seconds
        return attention + self.padding_seconds + self.recompute_seconds

    def numbers(self) -> dict[str, Any]:
        """The figures for a remark."""
        return {
            "block_size": self.block_size,
            "piece_kb": self.piece_bytes / 1024,
            "read_gb_per_s": self.read_bandwidth / 1e9,
            "read_us": self.read_seconds * 1e6,
            "prefill_us": self.prefill_seconds * 1e6,
            "gather_us": self.gather_seconds * 1e6,
            "padding_share": self.padding_share,
            "padding_kb": self.padding_bytes / 1024,
            "padding_us": self.padding_seconds * 1e6,
            "recomputed_tokens": self.recomputed_tokens,
            "recompute_us": self.recompute_seconds * 1e6,
            "total_us": self.seconds * 1e6,
        }


def block_cost(
    block_size: int,
    layers: Sequence[AttentionSpec],
    model: ModelCost,
    workload: Workload,
    target: Target,
) -> BlockCost:
    """The cost of ``block_size`` tokens a block for a decode step of ``workload.concurrency`` requests.

    Reading: each layer's tokens at the bandwidth of the piece its kernel reads. Prefill: the products of a prompt,
    and a softmax step a chunk. Gathering: the rows of a "row" cache, once for a decoding token and once for each tile
    of prompt tokens. Padding: a cache of a given size holds that much fewer requests, so each request pays a larger
    part of the step's fixed cost, reading the weights; the cache counts as full, since frameworks keep finished
    requests in it for their prefixes. Recomputing: the expected (block_size - 1) / 2 tokens of a shared prefix. What
    happens once a request is spread over its decode steps.
    """
    kernels, figures, batch = kernel_model(target), target.figures, workload.concurrency
    starts_per_step = batch / workload.mean_output_tokens
    padding = workload.mean_padding_tokens(block_size)
    specs = [kernels.laid_out(layer, block_size) for layer in layers]
    pieces = [kernels.piece_bytes(attention) for attention in specs]
    read_bytes = read_seconds = prefill_seconds = gather_seconds = padding_bytes = 0.0
    for attention, piece in zip(specs, pieces, strict=True):
        prefill = kernels.prefill(attention)
        layer_bytes = batch * workload.mean_decode_tokens(attention.mask.window) * attention.cache.token_bytes
        read_bytes += layer_bytes
        read_seconds += layer_bytes / figures.piece_rate(piece)
        keys = starts_per_step * workload.mean_prefill_keys(attention.mask.window)
        row_key = kernels.row_key_seconds(attention, prefill)
        prefill_seconds += keys * attention.num_heads * row_key / figures.threads
        gathered = layer_bytes + keys / prefill.max_tokens * attention.cache.token_bytes
        gather_seconds += gathered * kernels.gather_seconds(attention) / figures.threads
        padding_bytes += batch * padding * attention.cache.token_bytes
    share = padding / (workload.mean_decode_tokens() + padding)
    recomputed = workload.mean_recomputed_tokens(block_size)
    return BlockCost(
        block_size=block_size,
        piece_bytes=min(pieces),
        read_bandwidth=read_bytes / read_seconds,
        read_seconds=read_seconds,
        prefill_seconds=prefill_seconds,
        gather_seconds=gather_seconds,
        padding_share=share,
        padding_bytes=padding_bytes,
        padding_seconds=model.weight_seconds(figures) * share / (1 - share),
        recomputed_tokens=recomputed,
        recompute_seconds=starts_per_step * recomputed * model.token_seconds(figures),
    )


def cheapest(costs: Sequence[BlockCost], error: float = FIGURES_ERROR) -> BlockCost:
    """The smallest block size whose time is the least, or cannot be told from it: it shares prefixes best.

    ``error``: part by which times must differ to be told apart.
    """
    least = min(cost.seconds for cost in costs)
    return min((cost for cost in costs if cost.seconds <= least * (1 + error)), key=lambda cost: cost.block_size)


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
