"""How many tokens a block of the KV cache holds: the smallest size of about the least time per decode step.

Costs pull in two directions. Small blocks waste less: fewer slots of a request's last block lie empty, and less
of a shared prefix is computed again because a prefix cache keeps whole blocks alone. Blocks smaller than a
chunk of keys (see tiles.py) are read in smaller contiguous pieces, and take more softmax steps in prefill; blocks
that do not hold whole vectors of keys are gathered row by row first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmir.errors import LlmirError
from llmir.ir.attention import PagedAttention, signature_of
from llmir.ir.bindings import ir
from llmir.ir.module import model_info, ops_of, retype_caches
from llmir.ir.remarks import Remark, add_remark
from llmir.ir.signature import ELEMENT_BYTES, AttentionSignature, Isa
from llmir.passes import tiles
from llmir.passes.model_cost import ModelCost
from llmir.target import Target
from llmir.workload import Workload

#: Figures of a machine measured twice differ by so much and more, and the workload is a guess.
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
    layers: Sequence[AttentionSignature],
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
    figures, batch = target.figures, workload.concurrency
    starts_per_step = batch / workload.mean_output_tokens
    padding = workload.mean_padding_tokens(block_size)
    pieces = [piece_bytes(layer, block_size, target.isa) for layer in layers]
    read_bytes = read_seconds = prefill_seconds = gather_seconds = padding_bytes = 0.0
    for layer, piece in zip(layers, pieces, strict=True):
        layer_bytes = batch * workload.mean_decode_tokens(layer.window) * layer.token_bytes
        read_bytes += layer_bytes
        read_seconds += layer_bytes / figures.piece_rate(piece)
        keys = starts_per_step * workload.mean_prefill_keys(layer.window)
        prefill_seconds += keys * prefill_seconds_per_key(layer, block_size, target)
        if tiles.layout(target.isa, layer.element_type, block_size) == "row":
            gathered = layer_bytes + keys / tiles.prefill_tokens(layer.queries_per_kv) * layer.token_bytes
            gather_seconds += gathered * tiles.GATHER_FLOPS / (figures.f32_rate * figures.threads)
        padding_bytes += batch * padding * layer.token_bytes
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


def laid_out(layer: AttentionSignature, block_size: int, isa: Isa) -> AttentionSignature:
    """``layer`` with blocks of ``block_size`` tokens, in the layout they get."""
    return replace(layer, block_size=block_size, layout=tiles.layout(isa, layer.element_type, block_size))


def piece_bytes(layer: AttentionSignature, block_size: int, isa: Isa) -> int:
    """Bytes decode reads at a time: the keys of a chunk that lie in one page, and then as many of its values.

    Of a "row" cache, the rows on their way: they lie in many places, but memory is asked for all of them at once,
    as it is for the lines of a contiguous piece.
    """
    signature = laid_out(layer, block_size, isa)
    if signature.layout == "row":
        keys = tiles.ROWS_AHEAD
    else:
        keys = min(block_size, tiles.key_chunk(signature, isa, tiles.DECODE_KEYS))
    return keys * layer.head_size * ELEMENT_BYTES[layer.element_type]


def prefill_seconds_per_key(layer: AttentionSignature, block_size: int, target: Target) -> float:
    """Seconds that one prompt token spends on one key, all threads together."""
    chunk = tiles.key_chunk(laid_out(layer, block_size, target.isa), target.isa, tiles.PREFILL_KEYS)
    flops = 4 * layer.num_heads * layer.head_size
    pairs = tiles.multiplies_pairs(target.isa, layer.element_type)
    rate = target.figures.bf16_rate if pairs else target.figures.f32_rate
    return flops * (1 + tiles.SOFTMAX_KEYS / chunk) / (rate * target.figures.threads)


def cheapest(costs: Sequence[BlockCost]) -> BlockCost:
    """The smallest block size whose time is the least, or cannot be told from it: it shares prefixes best."""
    least = min(cost.seconds for cost in costs)
    return min(
        (cost for cost in costs if cost.seconds <= least * (1 + FIGURES_ERROR)), key=lambda cost: cost.block_size
    )


class BlockSizing:
    """Gives every KV cache of the module the :func:`cheapest` block size, unless the user has set one."""

    name = "block-sizing"

    def __init__(self, target: Target, workload: Workload):
        self.target = target
        self.workload = workload

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        info = model_info(module)
        attention = ops_of(module, PagedAttention)
        if not attention:
            raise LlmirError(f"{info.model} has no attention over a paged KV cache: there is nothing to compile")
        layers = [signature_of(op) for op in attention]
        current = layers[0].block_size
        candidates = [size for size in info.allowed_block_sizes if size > 0]
        if info.block_size_fixed:
            candidates = sorted({current, *candidates})
        if not candidates:
            allowed = ", ".join(map(str, info.allowed_block_sizes)) or "none"
            raise LlmirError(f"no block size that {info.framework} allows ({allowed}) holds a token")
        model = ModelCost.of(module)
        costs = [block_cost(size, layers, model, self.workload, self.target) for size in candidates]
        best = cheapest(costs)
        chosen = next(cost for cost in costs if cost.block_size == current) if info.block_size_fixed else best
        retype_caches(module, lambda _layer, cache: cache.replace(block_size=chosen.block_size))
        add_remark(module, self._remark(chosen, best, costs, fixed=info.block_size_fixed))

    def _remark(self, chosen: BlockCost, best: BlockCost, costs: Sequence[BlockCost], *, fixed: bool) -> Remark:
        why = "set by the user" if fixed else f"smallest within {FIGURES_ERROR:.0%} of the least time"
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
                "workload": self.workload.name,
                "concurrency": self.workload.concurrency,
                "figures": self.target.figures.origin,
            },
            alternatives=[cost.numbers() for cost in costs if cost is not chosen],
        )
