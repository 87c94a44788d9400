"""Modules small enough to read, for the tests of this folder."""

from llmir.ir import build
from llmir.ir.attention import FusedAttention, PagedAttention
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.attributes import Selection
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import CpuVariant, KernelSpec, StepPolicy
from llmir.ir.module import ModelInfo, decoder, new_module, ops_of
from llmir.ir.types import PagedKVCache, tensor
from llmir.ir.weight import Weight

INFO = ModelInfo("vllm 0.32.0", "tiny", allowed_block_sizes=(32, 64, 128))
POLICY = StepPolicy(decode_tokens=1, split_keys=512, items_per_thread=2)
VARIANT = CpuVariant("decode", 1, 3, 64, 4, 4, 64)
LAYER = "model.layers.{}.self_attn.attn"


def cache_type(max_length=8192, head_size=64, **changes):
    """A cache of 3 heads of 64; ``changes`` are of its format."""
    values = {"dtype": "bf16", "num_kv_heads": 3, "key_size": head_size, "value_size": head_size, "block_size": 128}
    return PagedKVCache.build(CacheFormat(**{**values, **changes}), max_length=max_length)


def weight(name, *shape):
    return Weight.build(name, tensor(shape, "bf16"))


def selection():
    return Selection.build(isa="avx512_bf16", variants=[VARIANT], policy=POLICY)


def attention_module(layers=1, cache=None, selection=None, **attention):
    """``layers`` times append_kv and paged_attention, 9 query heads on 3 KV heads of 64."""
    module = new_module(INFO)
    with decoder(module) as d:
        x = d.input("x", tensor([None, 9, 64], "bf16"))
        key, value = (d.input(name, tensor([None, 3, 64], "bf16")) for name in ("key", "value"))
        for number in range(layers):
            layer = LAYER.format(number)
            with ir.Location.name(layer):
                filled = build.append_kv(d.cache(layer, cache or cache_type()), key, value, d.slots, layer=layer)
                step = (d.block_table, d.query_start, d.sequence_lengths)
                x = build.paged_attention(x, filled, *step, **{"layer": layer, "scale": 0.125, **attention})
                if selection is not None:
                    x.owner.attributes["selection"] = selection
        d.output(x)
    return module


def fuse(module):
    """Every append_kv and the paged_attention behind it become a fused_attention."""
    for op in ops_of(module, PagedAttention):
        append = op.cache.owner.opview
        with ir.InsertionPoint(op.operation), op.location:
            fused = build.fused_attention(append, op)
        op.result.replace_all_uses_with(fused.result)
        op.operation.erase()
        append.operation.erase()


def fused_module(kernel=None, spec=None):
    """One fused_attention, and a kernel op if ``spec`` is given."""
    module = attention_module(cache=cache_type(layout="pair"))
    fuse(module)
    if kernel is not None:
        ops_of(module, FusedAttention)[0].attributes["kernel"] = ir.FlatSymbolRefAttr.get(kernel)
    if spec is not None:
        with ir.InsertionPoint.at_block_begin(module.body), ir.Location.unknown():
            build.kernel(spec, POLICY)
    return module


def kernel_spec(**changes):
    """The spec of :func:`fused_module`'s attention."""
    values = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "dtype": "bf16", "block_size": 128}
    attention = AttentionSpec.dense(**{**values, "scale": 0.125, "layout": "pair", **changes})
    return KernelSpec(attention, "avx512_bf16", (VARIANT,))


def llama_layer():
    """One decoder layer with every kind of op it has, embedding and logits around it."""
    module = new_module(INFO)
    with decoder(module) as d:
        with ir.Location.name("model.embed_tokens"):
            x = build.embedding(d.input_ids, weight("model.embed_tokens.weight", 49152, 576))
        with ir.Location.name("model.layers.0"):
            residual = x
            x = build.rms_norm(x, weight("input_layernorm.weight", 576), epsilon=1e-5)
            q, k, v = build.split(build.linear(x, weight("qkv_proj.weight", 960, 576)), [576, 192, 192])
            q, k = build.rope(d.positions, q, k, head_size=64, base=1e5)
            q, k, v = (build.reshape(t, [None, heads, 64]) for t, heads in ((q, 9), (k, 3), (v, 3)))
            cache = build.append_kv(d.cache(LAYER.format(0), cache_type()), k, v, d.slots, layer=LAYER.format(0))
            step = (d.block_table, d.query_start, d.sequence_lengths)
            x = build.paged_attention(q, cache, *step, layer=LAYER.format(0), scale=0.125)
            x = build.linear(build.reshape(x, [None, 576]), weight("o_proj.weight", 576, 576))
            x = build.all_reduce(x, ranks=2)
            x, residual = build.rms_norm(x, weight("norm.weight", 576), epsilon=1e-5, residual=residual)
            x = build.activation(build.linear(x, weight("gate_up_proj.weight", 3072, 576)), "silu_and_mul")
            x = build.linear(x, weight("down_proj.weight", 576, 1536), weight("down_proj.bias", 576))
            x = build.elementwise("mul", build.elementwise("add", x, residual), scalar=0.1)
        d.output(build.logits(x, weight("model.embed_tokens.weight", 49152, 576), soft_cap=30))
    return module
