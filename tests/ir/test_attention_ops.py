import pytest
from small_models import LAYER, attention_module, cache_type, fused_module, kernel_spec, llama_layer, selection, weight

from llmir.ir import build
from llmir.ir.attention import AppendKV, FusedAttention, Kernel, PagedAttention, spec_of, step_policy
from llmir.ir.attention import kernel_spec as kernel_spec_of
from llmir.ir.attention_spec import Alibi, AttentionSpec, Mask, SoftCap
from llmir.ir.attributes import AttentionSpecAttr, Selection, to_attribute, to_python
from llmir.ir.bindings import ir, passmanager, rewrite
from llmir.ir.kernel_spec import CpuVariant, StepPolicy
from llmir.ir.module import ModelInfo, decoder, new_module, ops_of
from llmir.ir.text import InvalidModuleError, parse, print_module, verify
from llmir.ir.types import tensor


def refused(module, message):
    with pytest.raises(InvalidModuleError, match=message):
        verify(module)


def attention_of(module):
    return ops_of(module, PagedAttention)[0]


def test_the_spec_says_what_the_op_says():
    cache = cache_type(block_size=64, layout="pair")
    module = attention_module(cache=cache, mask=Mask(window=4096), score_stages=[SoftCap(50.0)])
    sizes = {"num_heads": 9, "num_kv_heads": 3, "head_size": 64, "dtype": "bf16", "block_size": 64, "scale": 0.125}
    expected = AttentionSpec.dense(**sizes, window=4096, soft_cap=50.0, layout="pair")
    assert spec_of(attention_of(module)) == expected


def test_a_quantized_cache_is_beside_queries_of_another_type():
    module = attention_module(cache=cache_type(dtype="f8E4M3FN", scales="layer"))
    spec = spec_of(attention_of(module))
    assert (spec.dtype, spec.cache.dtype, spec.cache.token_head_bytes) == ("bf16", "f8E4M3FN", 2 * 64)


def test_the_spec_says_that_there_are_sinks():
    module = attention_module(sinks=weight("sinks", 9))
    assert spec_of(attention_of(module)).sinks


def test_the_spec_keeps_the_scale_exactly_through_text():
    scale = 80**-0.5
    module = parse(print_module(attention_module(scale=scale)))
    assert spec_of(attention_of(module)).scale == scale


def test_what_no_kernel_computes_is_said_all_the_same():
    slopes = [2.0**-n for n in range(1, 10)]
    module = attention_module(mask=Mask(causal=False), score_stages=[SoftCap(5.0), Alibi()], slopes=slopes)
    op = attention_of(parse(print_module(module)))
    read = spec_of(op)
    assert (read.mask.causal, read.score_stages) == (False, (SoftCap(5.0), Alibi()))
    assert to_python(op.slopes) == slopes


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, but is 0"),
        ({"mask": Mask(window=-1)}, "window must be 0 \\(none\\) or a number of tokens, but is -1"),
        ({"score_stages": [SoftCap(-2.0)]}, "a soft cap must be positive, but is -2"),
        ({"score_stages": [Alibi()], "slopes": [0.5]}, "1 ALiBi slopes for 9 heads"),
        ({"score_stages": [Alibi()]}, "0 ALiBi slopes for 9 heads"),
        ({"slopes": [0.5] * 9}, "9 ALiBi slopes for 9 heads of attention without ALiBi"),
    ],
)
def test_paged_attention_refuses(attributes, message):
    refused(attention_module(**attributes), f"model.layers.0.self_attn.attn: 'llm.paged_attention' op {message}")


def test_the_spec_is_of_the_operands():
    text = print_module(attention_module())
    for spoilt, message in (
        (text.replace("num_heads = 9", "num_heads = 6"), r"query must be \[tokens, 6, 64\]"),
        (text.replace("sinks = false", "sinks = true"), "spec.sinks is True, and the weight is None"),
        (text.replace('dtype = "bf16", mask', 'dtype = "f16", mask'), "spec is of queries in f16, not bf16"),
        (text.replace("mask = {", "masks = {"), "spec cannot be read: .*mask"),
    ):
        assert spoilt != text
        with pytest.raises(InvalidModuleError, match=message):
            parse(spoilt)


def test_the_spec_s_cache_is_the_operand_s():
    module = attention_module()
    op = attention_of(module)
    op.attributes["spec"] = AttentionSpecAttr.build(spec_of(op).with_cache(block_size=64))
    refused(module, "spec is of CacheFormat.*block_size=64.*but the cache CacheFormat.*block_size=128")


def test_sinks_are_one_a_head():
    refused(attention_module(sinks=weight("sinks", 3)), r"sinks 'sinks' has shape \[3\]")


def test_query_heads_share_kv_heads_evenly():
    text = print_module(attention_module()).replace("num_kv_heads = 3", "num_kv_heads = 2")
    text = text.replace("tensor<?x3x64xbf16>", "tensor<?x2x64xbf16>")
    with pytest.raises(InvalidModuleError, match=r"-:\d+:\d+: .*9 query heads do not share 2 KV heads evenly"):
        parse(text)


def test_keys_fit_the_cache():
    text = print_module(attention_module()).replace("tensor<?x3x64xbf16>", "tensor<?x3x32xbf16>")
    with pytest.raises(InvalidModuleError, match=r"'llm.append_kv' op key must be \[tokens, 3, 64\]"):
        parse(text)


def test_a_cache_s_invariants_are_verified_where_it_is_used():
    text = print_module(attention_module()).replace("block_size = 128", "block_size = 0")
    with pytest.raises(InvalidModuleError, match=r"-:\d+:\d+: .*block_size of a KV cache must be positive, not 0"):
        parse(text)


def test_append_needs_a_cache():
    with pytest.raises(InvalidModuleError, match=r"expected base type 'llm.paged_kv_cache'"):
        parse(
            'func.func @f(%x: tensor<?x3x64xbf16>, %s: tensor<?xi64>) {\n  %0 = "llm.append_kv"(%x, %x, %x, %s) '
            '{layer = "a"} : (tensor<?x3x64xbf16>, tensor<?x3x64xbf16>, tensor<?x3x64xbf16>, tensor<?xi64>) '
            "-> tensor<?x3x64xbf16>\n  return\n}"
        )


def test_selection_s_chunks_divide_the_block():
    module = attention_module(cache=cache_type(block_size=96), selection=selection())
    refused(module, "variant 'decode'.key_chunk is 64, and must divide the block size 96, or be a multiple of it")


def test_selection_s_chunks_of_rows_are_of_any_size():
    module = attention_module(cache=cache_type(block_size=3, layout="row"), selection=selection())
    verify(module)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variants": []}, "a selection needs at least one variant"),
        ({"isa": "sse2"}, "unknown instruction set 'sse2'"),
        (
            {"variants": [CpuVariant("decode", 1, 3, 64, 4.5, 4, 1)]},
            r"selection cannot be read: variants\[0\].key_vectors must be int, not 4.5",
        ),
    ],
)
def test_selection_is_verified(change, message):
    policy = StepPolicy(1, 512, 2)
    values = {"isa": "avx2", "variants": [CpuVariant("decode", 1, 3, 64, 4, 4, 64)], "policy": policy, **change}
    refused(attention_module(selection=Selection.build(**values)), message)


def test_selection_of_other_entries_is_refused():
    module = attention_module(selection=selection())
    spoilt = print_module(module).replace("row_tile = 3 : i64, ", "")
    with pytest.raises(InvalidModuleError, match=r"selection cannot be read: .*row_tile"):
        parse(spoilt)


def test_kernel_carries_its_spec_and_policy():
    spec = kernel_spec()
    module = fused_module(kernel=spec.symbol, spec=spec)
    kernel = ops_of(module, Kernel)[0]
    assert kernel.sym_name.value == "attention_9x3x64_bf16_block128"
    assert kernel_spec_of(kernel) == spec
    assert step_policy(kernel) == StepPolicy(1, 512, 2)


def test_fused_attention_with_its_kernel_is_valid():
    verify(fused_module(kernel=kernel_spec().symbol, spec=kernel_spec()))


def test_fused_attention_has_the_spec_of_its_parts():
    module = fused_module()
    assert spec_of(ops_of(module, FusedAttention)[0]) == kernel_spec().attention


def test_a_kernel_that_is_not_there_is_named():
    refused(fused_module(kernel="missing"), "model.layers.0.self_attn.attn: kernel @missing is not in the module")


def test_a_kernel_of_another_spec_is_refused():
    spec = kernel_spec(scale=0.25)
    refused(fused_module(kernel=spec.symbol, spec=spec), "is made for another spec than layer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layout": "logical"}, "needs a decided cache layout"),
        ({"num_kv_heads": 2}, "9 query heads do not share 2 KV heads evenly"),
        ({"head_size": 0}, "key_size of a KV cache must be positive, not 0"),
        ({"head_size": 76}, "its head size is 76, and there are kernels for multiples of 8"),
        ({"dtype": "i8"}, "queries are bf16, f16, f32, not i8"),
    ],
)
def test_kernel_refuses(change, message):
    refused(fused_module(spec=kernel_spec(**change)), message)


def test_a_kernel_s_spec_of_other_entries_is_refused():
    module = fused_module(spec=kernel_spec())
    ops_of(module, Kernel)[0].attributes["spec"] = AttentionSpecAttr.get(to_attribute({"num_heads": 9}))
    refused(module, "spec cannot be read: .*missing")


def latent_module(**change):
    values = {"heads": 4, "width": 48, "latent": 32, "rope": 16, "cache": 48, "expand": (4 * (32 + 24), 32), **change}
    module = new_module(ModelInfo("vllm 0.32.0", "mla"))
    with decoder(module) as d:
        query = d.input("query", tensor([None, values["heads"], values["width"]], "bf16"))
        latent = d.input("latent", tensor([None, values["latent"]], "bf16"))
        rope_key = d.input("rope_key", tensor([None, values["rope"]], "bf16"))
        cache = d.cache("attn", cache_type(num_kv_heads=1, head_size=values["cache"]))
        step = (d.slots, d.block_table, d.query_start, d.sequence_lengths)
        options = {"expand": weight("kv_b_proj", *values["expand"]), "scale": 0.1, "value_size": 24}
        d.output(build.latent_attention(query, latent, rope_key, cache, *step, layer="attn", **options).result)
    return module


def test_latent_attention_is_valid():
    verify(latent_module())


def test_latent_attention_s_cache_holds_latent_and_rotary_key():
    refused(latent_module(cache=64), "the cache must hold one head of 32 \\+ 16 elements")


def test_latent_attention_s_expansion_fits():
    refused(latent_module(expand=(10, 32)), "expand 'kv_b_proj' has shape")


def test_latent_attention_needs_known_heads():
    refused(latent_module(heads=None), "query's heads and size must be known")


def test_append_is_never_removed():
    module = llama_layer()
    attention = attention_of(module)
    attention.result.replace_all_uses_with(attention.query)
    attention.operation.erase()
    passmanager.PassManager.parse("builtin.module(canonicalize,cse)").run(module.operation)
    assert len(ops_of(module, AppendKV)) == 1


def test_an_op_can_be_replaced_by_a_pattern():
    """The shape of every rewriting pass: PagedAttention and its append become one op."""

    def fuse(op, rewriter):
        append = op.cache.owner.opview
        with rewriter.ip, op.location:
            fused = build.fused_attention(append, op)
        rewriter.replace_op(op, [fused.result])
        rewriter.erase_op(append)

    module = attention_module(layers=2)
    patterns = rewrite.RewritePatternSet()
    patterns.add(PagedAttention, fuse)
    rewrite.walk_and_apply_patterns(module.operation, patterns.freeze())
    verify(module)
    assert len(ops_of(module, FusedAttention)) == 2
    assert ops_of(module, PagedAttention, AppendKV) == []
    assert ops_of(module, FusedAttention)[1].operation.location == ir.Location.name(LAYER.format(1))
