"""What passes know of a target's attention kernels: what there is none for, tiles, and what they cost.

Passes ask a :class:`KernelModel` and nothing else about the kind of machine they decide for; each kind has one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import Layout
from llmir.ir.kernel_spec import CpuVariant, GpuVariant, StepPolicy
from llmir.targets.machine import Target

#: A split's own cost may be this part of its reading.
SPLIT_OVERHEAD = 1 / 8
#: Shared parts do this part of what the products and softmax steps alone could: 0.55 to 0.67 on Zen 5, from blocks of
#: 16 tokens; whole prompts 0.76 and more. Unverified on GPUs.
TILE_EFFICIENCY = 0.6

VariantT = TypeVar("VariantT", CpuVariant, GpuVariant)


class KernelModel(ABC, Generic[VariantT]):
    """The kernels of one target. Times are seconds of one thread, as Measurements counts threads."""

    items_per_thread: int
    """See StepPolicy."""
    merge_seconds: float
    """Merging the state of one row, besides reading it."""
    calls_saved_by_fusion: int
    """Times that threads are started less, in a layer whose append and attention are one call."""

    def __init__(self, target: Target):
        self.target = target
        self.figures = target.figures

    # -- what there are kernels for

    def check(self, layer: str, attention: AttentionSpec) -> None:
        """Raise UnsupportedLayerError for attention that there is no kernel for."""
        if reasons := self.target.supports(attention):
            raise UnsupportedLayerError(layer, "; ".join(reasons))

    # -- tiles

    @abstractmethod
    def layout(self, dtype: str, block_size: int) -> Layout:
        """Arrangement of a page of ``block_size`` tokens."""

    def laid_out(self, layer: AttentionSpec, block_size: int) -> AttentionSpec:
        """``layer`` with blocks of ``block_size`` tokens, in the layout they get."""
        return layer.with_cache(block_size=block_size, layout=self.layout(layer.dtype, block_size))

    @abstractmethod
    def decode(self, attention: AttentionSpec) -> VariantT:
        """The variant for few tokens a request."""

    @abstractmethod
    def prefill(self, attention: AttentionSpec) -> VariantT:
        """The variant for many tokens a request, and for what requests share."""

    # -- costs

    @abstractmethod
    def piece_bytes(self, attention: AttentionSpec) -> int:
        """Bytes decode reads at one place of memory."""

    @abstractmethod
    def gather_seconds(self, attention: AttentionSpec) -> float:
        """Gathering one byte of the cache before it is multiplied; 0 where it is read as it lies."""

    @abstractmethod
    def row_key_seconds(self, attention: AttentionSpec, prefill: VariantT) -> float:
        """One query row against one key and its value in a tile of prefill, its part of the softmax included."""

    @abstractmethod
    def decode_row_key_seconds(self, attention: AttentionSpec, decode: VariantT, prefill: VariantT) -> float:
        """The same in a tile of decode, with TILE_EFFICIENCY."""

    def tile_key_seconds(self, attention: AttentionSpec, prefill: VariantT) -> float:
        """A tile of prefill against one key, with TILE_EFFICIENCY."""
        return prefill.row_tile * self.row_key_seconds(attention, prefill) / TILE_EFFICIENCY

    @abstractmethod
    def split_bandwidth(self) -> float:
        """Bytes a second at which one thread reads a split."""

    @abstractmethod
    def split_seconds(self, attention: AttentionSpec) -> float:
        """What one more split costs."""

    def policy(self, attention: AttentionSpec, decode: VariantT) -> StepPolicy:
        """The run-time conditions: a split is so long that its own cost is at most SPLIT_OVERHEAD of its reading."""
        key_seconds = attention.cache.token_head_bytes / self.split_bandwidth()
        keys = self.split_seconds(attention) / SPLIT_OVERHEAD / key_seconds
        return StepPolicy(
            decode_tokens=decode.max_tokens,
            split_keys=math.ceil(keys / decode.key_chunk) * decode.key_chunk,
            items_per_thread=self.items_per_thread,
        )

    # -- for a reader

    @abstractmethod
    def describe(self, variant: VariantT) -> str:
        """Tile sizes in a few words, with the variant's name."""

    @abstractmethod
    def describe_tile(self, variant: VariantT) -> str:
        """What a tile of ``variant`` is, in fewer words."""

    @abstractmethod
    def numbers(self, attention: AttentionSpec, decode: VariantT, prefill: VariantT) -> dict[str, Any]:
        """What the tile sizes rest on."""

    @abstractmethod
    def alternatives(self, attention: AttentionSpec, prefill: VariantT) -> list[dict[str, Any]]:
        """Other tiles of prefill, with what speaks against them."""

    @abstractmethod
    def reading(self, attention: AttentionSpec) -> dict[str, Any]:
        """Why pieces of memory are read as fast as they are."""
