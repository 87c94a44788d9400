"""What a block size of the KV cache costs a decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmir.costs.model import ModelCost
from llmir.ir.attention_spec import AttentionSpec
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model
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
