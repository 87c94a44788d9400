import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_modules import ops, run

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention import FusedAttention
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dtypes import QUERY_DTYPES
from llmir.ir.kernel_spec import CpuVariant, KernelSpec
from llmir.ir.module import caches_of, ops_of
from llmir.ir.remarks import remarks
from llmir.kernels.cpu import lowering
from llmir.passes.attention_fusion import AttentionFusion
from llmir.passes.kernel_selection import KernelSelection
from llmir.targets.kernel_model import SPLIT_OVERHEAD
from llmir.targets.machine import Target
from llmir.targets.registry import head_sizes, kernel_model
from llmir.targets.x86 import tiles
from llmir.targets.x86.isa import INSTRUCTION_SETS

BEST = Target.named("cpu:avx512_bf16")

isas = st.sampled_from(list(INSTRUCTION_SETS))
signatures = st.builds(
    lambda kv, group, size, element, block: AttentionSpec.dense(kv * group, kv, size, element, block, 0.125),
    st.integers(1, 16),
    st.integers(1, 64),
    st.sampled_from(head_sizes(on_gpu=False)),
    st.sampled_from(QUERY_DTYPES),
    st.integers(1, 40).flatmap(lambda size: st.sampled_from([size, 16 * size])),
)


def select(module, target=BEST):
    return run(module, AttentionFusion(target), KernelSelection(target))


def selected(module):
    return [op.selection for op in ops_of(module, FusedAttention)]


def test_the_pass_sets_layout_variants_and_conditions(parse):
    module = run(parse(), AttentionFusion(BEST))
    assert '"logical"' in str(module) and "selection" not in ops(module)[0]
    run(module, KernelSelection(BEST))
    assert caches_of(module)["layers.0"].format == CacheFormat("bf16", 3, 64, 64, 128, "pair")
    assert '"logical"' not in str(module)
    assert (
        'selection = #llm.selection<"avx512_bf16", [{key_chunk = 128 : i64, key_vectors = 2 : i64, '
        'max_tokens = 1 : i64, name = "decode", prefetch = 128 : i64, row_tile = 3 : i64, value_vectors = 4 : i64}, '
        '{key_chunk = 128 : i64, key_vectors = 4 : i64, max_tokens = 32 : i64, name = "prefill", prefetch = 128 : i64, '
        "row_tile = 6 : i64, value_vectors = 4 : i64}]"
    ) in ops(module)[0]


@pytest.mark.parametrize(
    ("isa", "element", "layout"),
    [
        ("avx512_bf16", "bf16", "pair"),
        ("avx512_bf16", "f16", "lane"),
        ("avx512_bf16", "f32", "lane"),
        ("avx512", "bf16", "pair"),
        ("avx2", "bf16", "pair"),
        ("avx2", "f16", "lane"),
    ],
)
def test_bfloat16_lies_in_pairs_whether_multiplied_or_widened(parse, isa, element, layout):
    module = select(parse(element=element), Target.named(f"cpu:{isa}"))
    assert caches_of(module)["layers.0"].format.layout == layout


@pytest.mark.parametrize(
    ("isa", "block_size", "layout"),
    [
        ("avx512_bf16", 1, "row"),
        ("avx512_bf16", 8, "row"),
        ("avx512_bf16", 16, "pair"),
        ("avx512_bf16", 24, "row"),
        ("avx512_bf16", 48, "pair"),
        ("avx512", 8, "row"),
        ("avx2", 4, "row"),
        ("avx2", 8, "pair"),
        ("avx2", 24, "pair"),
    ],
)
def test_blocks_without_whole_vectors_of_keys_are_rows(parse, isa, block_size, layout):
    module = select(parse(block_size=block_size), Target.named(f"cpu:{isa}"))
    assert caches_of(module)["layers.0"].format.layout == layout


def test_a_gathered_chunk_stays_small_whatever_the_block_size(parse):
    chunks = {
        head_size: {variant.key_chunk for variant in selected(module)[0].variants}
        for head_size in (64, 80, 128, 256)
        for module in [select(parse(block_size=1, head_size=head_size))]
    }
    assert chunks == {64: {128}, 80: {64}, 128: {64}, 256: {32}}


def test_layers_of_one_signature_get_one_selection_and_one_remark(parse):
    module = select(parse(windows=(0, 512, 0)))
    first, windowed, third = selected(module)
    assert first == third == windowed  # a window changes the code, not the tiles
    subjects = [r.subject for r in remarks(module) if r.pass_name == "kernel-selection"]
    assert subjects == ["2 layers (layers.0 to layers.2)", "layers.1"]


def test_the_remark_holds_registers_times_and_other_tiles(parse):
    remark = remarks(select(parse()))[-1]
    assert remark.numbers["prefill_registers"] == 29 and remark.numbers["registers"] == 32
    assert remark.numbers["decode_read_ns_per_key"] > remark.numbers["decode_multiply_ns_per_key"] > 0
    assert "256" not in remark.subject and f"parts of {remark.numbers['split_keys']} keys" in remark.reason
    assert all(a["loads_per_product"] > remark.numbers["prefill_loads_per_product"] for a in remark.alternatives)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"head_size": 76}, "its head size is 76, and there are kernels for multiples of 8 from 32 to 576 on a CPU"),
        (
            {"causal": False, "score_stages": "[{}]", "more": ", slopes = [" + ", ".join(["0.5 : f64"] * 9) + "]"},
            "ALiBi of bidirectional attention has no kernel",
        ),
        (
            {"score_stages": "[{}, {cap = 5.0 : f64}]", "more": ", slopes = [" + ", ".join(["0.5 : f64"] * 9) + "]"},
            "scores that go through ALiBi, then a soft cap have no kernel on a CPU",
        ),
        ({"element": "f8E4M3FN"}, "a KV cache of f8E4M3FN has no kernel on a CPU"),
    ],
)
def test_what_has_no_kernel_is_refused_by_layer(parse, facts, reason):
    with pytest.raises(UnsupportedLayerError) as error:
        select(parse(**facts))
    assert (error.value.layer, error.value.reason) == ("layers.0", reason)


@given(signatures, isas)
def test_every_selection_can_be_generated(attention, isa):
    spec = spec_of(attention, isa)
    lowering.check(spec)
    for variant in spec.variants:
        assert tiles.fits(isa, variant.row_tile, max(variant.key_vectors, variant.value_vectors))


def laid_out(attention, isa):
    return attention.with_cache(layout=tiles.layout(isa, attention.dtype, attention.cache.block_size))


def spec_of(attention, isa):
    attention = laid_out(attention, isa)
    return KernelSpec(attention, isa, (tiles.decode_variant(attention, isa), tiles.prefill_variant(attention, isa)))


@given(st.integers(1, 1000), st.integers(1, 64))
def test_balanced_tiles_cover_all_and_differ_little(total, most):
    size = tiles.balanced(total, most)
    count = -(-total // most)
    assert 1 <= size <= most and -(-total // size) == count and size * count - total < count


@given(signatures, isas)
def test_prefill_items_hold_at_least_one_token_and_not_many_more_rows_than_meant(attention, isa):
    tokens = tiles.prefill_variant(laid_out(attention, isa), isa).max_tokens
    assert tokens >= 1 and (tokens == 1 or tokens * attention.queries_per_kv <= tiles.PREFILL_ROWS)


@given(signatures, isas)
def test_splits_are_whole_chunks_whose_own_cost_is_small(attention, isa):
    attention, kernels = laid_out(attention, isa), kernel_model(Target.named(f"cpu:{isa}"))
    decode = kernels.decode(attention)
    keys = kernels.policy(attention, decode).split_keys
    read = keys * attention.cache.token_head_bytes / kernels.figures.read_bandwidth
    assert keys % decode.key_chunk == 0 and keys > 0
    assert kernels.split_seconds(attention) <= SPLIT_OVERHEAD * read * (1 + 1e-9)


def test_the_tiles_of_smollm2_and_llama():
    smollm2 = AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125)
    llama = AttentionSpec.dense(32, 8, 128, "bf16", 128, 0.125)
    assert tiles.decode_variant(smollm2, "avx512_bf16") == CpuVariant("decode", 1, 3, 128, 2, 4, 128)
    assert tiles.prefill_variant(smollm2, "avx512_bf16") == CpuVariant("prefill", 32, 6, 128, 4, 4, 128)
    assert tiles.decode_variant(llama, "avx512_bf16") == CpuVariant("decode", 1, 2, 128, 2, 8, 128)
    assert tiles.decode_variant(smollm2, "avx2") == CpuVariant("decode", 1, 3, 128, 2, 3, 64)
    assert tiles.decode_variant(llama, "avx2") == CpuVariant("decode", 1, 4, 128, 2, 2, 32)
    assert tiles.prefill_variant(llama, "avx2") == CpuVariant("prefill", 24, 6, 128, 2, 2, 128)


def test_chunks_are_whole_blocks_or_divide_one():
    blocks = {size: AttentionSpec.dense(9, 3, 64, "bf16", size, 0.125, layout="pair") for size in (16, 48, 96, 160)}
    chunks = {size: tiles.key_chunk(attention, "avx512_bf16", 128) for size, attention in blocks.items()}
    assert chunks == {16: 128, 48: 96, 96: 96, 160: 32}
