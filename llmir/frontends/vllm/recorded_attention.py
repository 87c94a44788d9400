"""Attention layers that only keep what they were built with: those of a model that is imported.

vLLM would ask its platform for a backend, and each has conditions of its own for being built at all; an importer that
reads a model for another machine than its own must not depend on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.model_executor.layers.attention import attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl


class RecordedImpl(AttentionImpl[Any]):
    """The arguments of an attention layer, under vLLM's own names."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ):
        self.scale = float(scale)
        self.alibi_slopes = alibi_slopes
        self.logits_soft_cap = logits_soft_cap
        self.sinks = extra.get("sinks")
        self.extra = {name: value for name, value in extra.items() if value is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Never called: a handler stands in the layer's place."""
        raise NotImplementedError


class RecordedBackend(AttentionBackend):
    """Takes any layer; the importer says what llmir has no kernel for."""

    @staticmethod
    def get_name() -> str:
        """A name in vLLM's registry, where a layer looks itself up."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[RecordedImpl]:
        """The class that keeps arguments."""
        return RecordedImpl

    @staticmethod
    def get_builder_cls() -> Any:
        """None is ever built."""
        raise NotImplementedError

    @staticmethod
    def get_kv_cache_shape(*args: Any, **kwargs: Any) -> tuple[int, ...]:
        """There is no cache."""
        raise NotImplementedError


@contextmanager
def recorded_attention() -> Iterator[None]:
    """Within, vLLM's ``Attention`` layers are built as recorded ones."""
    select = attention.get_attn_backend
    attention.get_attn_backend = lambda *args, **kwargs: RecordedBackend
    try:
        yield
    finally:
        attention.get_attn_backend = select
