"""Everything about one attention layer on one rank, as plain records: layers with equal specs share a kernel.

The IR holds a spec as one attribute, which passes copy whole; a plan, a serving process and the key of a compiled
object hold the records themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from llmir.ir.cache_format import CacheFormat, Layout
from llmir.ir.dtypes import QUERY_DTYPES

#: Element type of a cache with scales that kernels know today.
QUANTIZED_DTYPE = "f8E4M3FN"


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees."""

    causal: bool = True
    """None of later tokens; else attention is bidirectional, as encoders have it."""
    window: int = 0
    """Of the last so many tokens alone, its own included; 0: of all. Where attention is bidirectional, of the next so
    many too."""

    @property
    def ahead(self) -> int | None:
        """So many tokens after its own a query sees; None: all."""
        return 0 if self.causal else self.window - 1 if self.window else None

    @property
    def width(self) -> int:
        """The most keys that a query sees; 0: of all that it may."""
        return self.window + (self.ahead or 0)


@dataclass(frozen=True)
class SoftCap:
    """Scores become ``cap * tanh(score / cap)`` (Gemma 2)."""

    title: ClassVar = "a soft cap"
    tag: ClassVar = "softcap"
    cap: float


@dataclass(frozen=True)
class Alibi:
    """A head's slope times the distance from query to key is taken off each score (arXiv 2108.12409).

    The slopes are not here, so that layers and ranks that differ in them share a kernel: an op says them.
    """

    title: ClassVar = "ALiBi"
    tag: ClassVar = "alibi"


#: ``title`` is for a reader, ``tag`` for a kernel's name.
ScoreStage = SoftCap | Alibi


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer, as the framework has it and as a kernel is made for it."""

    num_heads: int
    """Query heads."""
    dtype: str
    """Of queries, of new keys and values, and of the output; see dtypes.py."""
    scale: float
    """Factor on query-key products."""
    cache: CacheFormat
    mask: Mask = Mask()
    score_stages: tuple[ScoreStage, ...] = ()
    """What scores go through between scaling and mask, in order."""
    sinks: bool = False
    """Every query head has a score of its own that takes part in the softmax and has no value (gpt-oss)."""

    @classmethod
    def dense(
        cls,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        dtype: str,
        block_size: int,
        scale: float,
        *,
        window: int = 0,
        soft_cap: float = 0.0,
        layout: Layout = "logical",
        quantized: bool = False,
        sinks: bool = False,
        alibi: bool = False,
        value_size: int | None = None,
    ) -> AttentionSpec:
        """Causal attention as decoders have it.

        ``window``: see Mask. ``soft_cap``: see SoftCap; 0: none. ``quantized``: the cache is of QUANTIZED_DTYPE, with
        one scale of a layer's keys and one of its values; else it is of ``dtype``. ``head_size`` is that of keys, and
        of values where these have no ``value_size``.
        """
        cache = CacheFormat(
            QUANTIZED_DTYPE if quantized else dtype,
            num_kv_heads,
            head_size,
            value_size or head_size,
            block_size,
            layout,
            "layer" if quantized else "none",
        )
        stages: tuple[ScoreStage, ...] = (SoftCap(soft_cap),) if soft_cap else ()
        stages += (Alibi(),) if alibi else ()
        return cls(num_heads, dtype, scale, cache, Mask(window=window), stages, sinks)

    @property
    def num_kv_heads(self) -> int:
        """KV heads."""
        return self.cache.num_kv_heads

    @property
    def head_size(self) -> int:
        """Elements of a head's query and key."""
        return self.cache.key_size

    @property
    def value_size(self) -> int:
        """Elements of a head's value and output."""
        return self.cache.value_size

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def soft_cap(self) -> float:
        """The cap of the SoftCap among the score stages; 0: there is none."""
        return next((stage.cap for stage in self.score_stages if isinstance(stage, SoftCap)), 0.0)

    @property
    def alibi(self) -> bool:
        """Whether Alibi is among the score stages."""
        return any(isinstance(stage, Alibi) for stage in self.score_stages)

    def with_cache(self, **changes: Any) -> AttentionSpec:
        """The spec with some fields of its cache format changed."""
        return replace(self, cache=replace(self.cache, **changes))

    def problem(self) -> str | None:
        """The invariant that does not hold, in words."""
        if self.dtype not in QUERY_DTYPES:
            return f"queries are {', '.join(QUERY_DTYPES)}, not {self.dtype}"
        if self.num_heads <= 0 or self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} query heads do not share {self.num_kv_heads} KV heads evenly"
        if not self.scale > 0:
            return f"scale must be positive, but is {self.scale}"
        if self.mask.window < 0:
            return f"window must be 0 (none) or a number of tokens, but is {self.mask.window}"
        for stage in self.score_stages:
            if isinstance(stage, SoftCap) and not stage.cap > 0:
                return f"a soft cap must be positive, but is {stage.cap}"
        return None
