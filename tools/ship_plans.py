"""Writes the plans in benchmarks/plans: what the passes decide for well-known models on GPUs of published figures.

    python tools/ship_plans.py

A plan needs a model's shapes alone, so no weights and no framework are read: the decoders are built here, layer by
layer. tests/test_shipped_plans.py holds that the files are what the compiler makes today.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmir import compiler
from llmir.ir import build
from llmir.ir.attention_spec import QUANTIZED_DTYPE
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dialect import context
from llmir.ir.module import Decoder, ModelInfo, decoder, new_module
from llmir.ir.types import PagedKVCache, tensor
from llmir.ir.weight import Weight
from llmir.plan import Plan
from llmir.targets.machine import Target
from llmir.workload import DEFAULT

FOLDER = Path(__file__).parent.parent / "benchmarks/plans"
TARGETS = ("cuda:sm_90",)
#: vLLM's, the last that runs with the torch of the machines that the plans are measured on.
FRAMEWORK = "vllm 0.26.0"
#: What vLLM's attention backends for CUDA accept.
BLOCK_SIZES = (16, 32, 64, 128)


@dataclass(frozen=True)
class Model:
    """The shapes of a decoder; sizes as in the model's config.json."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    max_length: int
    rope_base: float
    cache_type: str = "bf16"
    sinks: bool = False


LLAMA = Model("meta-llama/Meta-Llama-3-8B", 32, 4096, 14336, 32, 8, 128, 128256, 8192, 5e5)
#: By the file's name.
MODELS = {
    "llama-3-8b": LLAMA,
    "llama-3-8b-fp8": replace(LLAMA, cache_type=QUANTIZED_DTYPE),
    "llama-3-8b-sinks": replace(LLAMA, sinks=True),  # no such model: the features of kernels at a common shape
    "qwen2-7b": Model("Qwen/Qwen2-7B-Instruct", 28, 3584, 18944, 28, 4, 128, 152064, 32768, 1e6),
    "phi-3-mini": Model("microsoft/Phi-3-mini-128k-instruct", 32, 3072, 8192, 32, 32, 96, 32064, 131072, 1e4),
}


def weight(name: str, *shape: int) -> Weight:
    """A bfloat16 parameter."""
    return Weight.build(f"{name}.weight", tensor(shape, "bf16"))


def module_of(model: Model) -> ir.Module:
    """The decoder of ``model``, in the current context; norms and residuals, which decide nothing, are left out."""
    module = new_module(ModelInfo(FRAMEWORK, model.name, allowed_block_sizes=BLOCK_SIZES))
    with decoder(module) as d:
        x = build.embedding(d.input_ids, weight("model.embed_tokens", model.vocabulary, model.hidden))
        for number in range(model.layers):
            x = _layer(d, x, model, f"model.layers.{number}")
        d.output(build.logits(x, weight("lm_head", model.vocabulary, model.hidden)))
    return module


def _layer(d: Decoder, x: ir.Value, model: Model, name: str) -> ir.Value:
    """Attention and feed-forward network of one layer."""
    heads, kv_heads, head_size = model.heads, model.kv_heads, model.head_size
    sizes = [heads * head_size, kv_heads * head_size, kv_heads * head_size]
    layer = f"{name}.self_attn.attn"
    qkv = build.linear(x, weight(f"{name}.self_attn.qkv_proj", sum(sizes), model.hidden))
    query, key, value = build.split(qkv, sizes)
    query, key = build.rope(d.positions, query, key, head_size=head_size, base=model.rope_base)
    query, key, value = (
        build.reshape(each, [None, count, head_size])
        for each, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    scales = "layer" if model.cache_type == QUANTIZED_DTYPE else "none"
    format = CacheFormat(model.cache_type, kv_heads, head_size, head_size, BLOCK_SIZES[0], scales=scales)
    cache = PagedKVCache.build(format, max_length=model.max_length)
    filled = build.append_kv(d.cache(layer, cache), key, value, d.slots, layer=layer)
    attended = build.paged_attention(
        query,
        filled,
        *(d.block_table, d.query_start, d.sequence_lengths),
        layer=layer,
        scale=head_size**-0.5,
        sinks=weight(f"{name}.self_attn.sinks", heads) if model.sinks else None,
    )
    x = build.linear(build.reshape(attended, [None, sizes[0]]), weight(f"{name}.o_proj", model.hidden, sizes[0]))
    x = build.linear(x, weight(f"{name}.mlp.gate_up_proj", 2 * model.intermediate, model.hidden))
    return build.linear(
        build.activation(x, "silu_and_mul"), weight(f"{name}.mlp.down_proj", model.hidden, model.intermediate)
    )


def plan_of(model: Model, target: str) -> Plan:
    """What the compiler decides today."""
    with context(), ir.Location.unknown():
        options = compiler.Options(calibrate=False, build_kernels=False)
        return compiler.compile(module_of(model), Target.named(target), DEFAULT, options)


def files() -> Iterator[tuple[Path, Model, str]]:
    """Every plan's file, model and target."""
    for target in TARGETS:
        for name, model in MODELS.items():
            yield FOLDER / target.replace(":", "-") / f"{name}.json", model, target


def main() -> None:
    """Write all plans."""
    for path, model, target in files():
        plan_of(model, target).write(path)
        print(f"wrote {path.relative_to(FOLDER.parent.parent)}")


if __name__ == "__main__":
    main()
