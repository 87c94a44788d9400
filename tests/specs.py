"""Specs of attention that tests vary."""

from __future__ import annotations

from typing import Any

from llmir.ir.attention_spec import AttentionSpec


def changed(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    """``spec``, which AttentionSpec.dense made, with some of that function's arguments changed."""
    made_with: dict[str, Any] = {
        "num_heads": spec.num_heads,
        "num_kv_heads": spec.num_kv_heads,
        "head_size": spec.head_size,
        "value_size": None if spec.value_size == spec.head_size else spec.value_size,
        "dtype": spec.dtype,
        "block_size": spec.cache.block_size,
        "scale": spec.scale,
        "window": spec.mask.window,
        "soft_cap": spec.soft_cap,
        "layout": spec.cache.layout,
        "quantized": spec.cache.quantized,
        "sinks": spec.sinks,
        "alibi": spec.alibi,
    }
    return AttentionSpec.dense(**{**made_with, **changes})
