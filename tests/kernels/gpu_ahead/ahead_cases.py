"""Kernels to compile ahead of time: shapes of known models, every feature, tiles as the passes choose them."""

from pathlib import Path

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec
from llmir.targets.gpu import tiles

PLANS = Path(__file__).parents[3] / "benchmarks" / "plans" / "cuda-sm_90"
#: (query heads, KV heads, head size).
LLAMA_3_8B = (32, 8, 128)
MODELS = {"llama-3-8b": LLAMA_3_8B, "qwen2-7b": (28, 4, 128), "phi-3-mini": (32, 32, 96)}
#: What attention may ask for besides plain causal attention in bfloat16 over pages of 32 tokens.
FEATURES = {
    "window": {"window": 4096},
    "soft cap": {"soft_cap": 30.0},
    "sinks": {"sinks": True},
    "fp8 cache": {"quantized": True},
    "f16": {"dtype": "f16"},
    "all": {"window": 4096, "soft_cap": 30.0, "sinks": True, "quantized": True},
    "a tile of keys in a page": {"block_size": 64},
    "pages of a token": {"block_size": 1},
}


def attention(heads=LLAMA_3_8B, **changes) -> AttentionSpec:
    values = {"dtype": "bf16", "block_size": 32, "scale": heads[2] ** -0.5, "layout": "row", **changes}
    return AttentionSpec.dense(*heads, **values)


def spec_of(isa="sm_90", heads=LLAMA_3_8B, **changes) -> KernelSpec:
    of_heads = attention(heads, **changes)
    return KernelSpec(of_heads, isa, (tiles.decode_variant(of_heads, isa), tiles.prefill_variant(of_heads, isa)))
