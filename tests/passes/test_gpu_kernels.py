"""What passes decide for GPUs, and that CPUs are not asked about it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_modules import run
from specs import changed

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention import FusedAttention
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, padded
from llmir.ir.module import caches_of, ops_of
from llmir.ir.remarks import remarks
from llmir.passes import pipeline
from llmir.passes.attention_fusion import AttentionFusion
from llmir.passes.block_sizing import BlockSizing
from llmir.passes.kernel_selection import KernelSelection
from llmir.targets.gpu import tiles
from llmir.targets.gpu.kernel_model import GpuKernels
from llmir.targets.gpu.kind import MOST_ROWS, Gpu
from llmir.targets.kernel_model import SPLIT_OVERHEAD
from llmir.targets.machine import Target
from llmir.targets.registry import kernel_model
from llmir.targets.x86.kernel_model import X86Kernels
from llmir.workload import NAMED

TARGETS = {name: Target.named(name) for name in ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")}
H100, A100, MI300X = TARGETS["cuda:sm_90"], TARGETS["cuda:sm_80"], TARGETS["hip:gfx942"]
LLAMA = AttentionSpec.dense(32, 8, 128, "bf16", 16, 128**-0.5, layout="row")
SIZES = {"heads": 32, "kv_heads": 8, "head_size": 128, "allowed": (16, 32, 64, 128)}

targets = st.sampled_from(sorted(TARGETS)).map(TARGETS.__getitem__)
signatures = st.builds(
    lambda kv, group, size, element, block: AttentionSpec.dense(
        kv * group, kv, size, element, block, 0.125, layout="row"
    ),
    st.integers(1, 16),
    st.integers(1, MOST_ROWS),
    st.sampled_from(Gpu.head_sizes),
    st.sampled_from(["bf16", "f16"]),
    st.sampled_from([1, 16, 48, 128]),
)


def select(module, target=H100):
    return run(module, AttentionFusion(target), KernelSelection(target))


def test_the_kind_of_target_decides_who_is_asked():
    assert isinstance(kernel_model(H100), GpuKernels)
    assert isinstance(kernel_model(Target.named("cpu:avx2")), X86Kernels)


# -- what there are kernels for


def refusal(target, **facts):
    attention = changed(LLAMA, **facts)
    try:
        kernel_model(target).check("layers.0", attention)
    except UnsupportedLayerError as error:
        assert error.layer == "layers.0"
        return error.reason
    return None


@pytest.mark.parametrize("name", TARGETS)
def test_float32_is_refused(name):
    assert "queries of f32 have no kernel on a GPU" in refusal(TARGETS[name], dtype="f32")


@pytest.mark.parametrize(("name", "has"), list(zip(TARGETS, (False, True, True, False), strict=True)))
def test_quantized_caches_have_kernels_where_triton_has_their_type(name, has):
    reason = refusal(TARGETS[name], quantized=True)
    assert reason is None if has else f"a KV cache of f8E4M3FN has no kernel on {TARGETS[name].isa}" in reason


@pytest.mark.parametrize("name", TARGETS)
def test_sinks_windows_and_soft_caps_have_kernels(name):
    assert refusal(TARGETS[name], sinks=True, window=128, soft_cap=30.0) is None


@pytest.mark.parametrize(("heads", "has"), [(128, True), (129, False)])
def test_query_heads_of_a_kv_head_fit_one_tile(heads, has):
    reason = refusal(H100, num_heads=heads, num_kv_heads=1)
    assert reason is None if has else "129 query heads share a KV head" in reason


def test_refusals_name_the_layer(parse):
    with pytest.raises(UnsupportedLayerError, match=r"layers\.0.*head size is 72"):
        select(parse(head_size=72))


# -- tiles


def test_pages_are_rows_of_any_block_size(parse):
    for size in (1, 24, 128):
        assert caches_of(select(parse(block_size=size)))["layers.0"].format.layout == "row"


def test_the_tiles_of_llama():
    kernels = kernel_model(H100)
    assert kernels.decode(LLAMA) == GpuVariant("decode", 4, 16, 64, 4, 3)
    assert kernels.prefill(LLAMA) == GpuVariant("prefill", 32, 128, 64, 8, 3)


@given(signatures, targets)
def test_tiles_hold_the_query_heads_of_a_kv_head_and_are_powers_of_two(attention, target):
    for variant in (kernel_model(target).decode(attention), kernel_model(target).prefill(attention)):
        assert 1 <= variant.max_tokens == variant.row_tile // attention.queries_per_kv
        assert variant.row_tile >= max(16, attention.queries_per_kv)
        for size in (variant.row_tile, variant.key_chunk, variant.warps):
            assert size == padded(size)


@given(signatures, targets)
def test_tiles_fit_a_thread_blocks_shared_memory(attention, target):
    for variant in (kernel_model(target).decode(attention), kernel_model(target).prefill(attention)):
        assert tiles.shared_bytes(attention, variant, target.isa) <= target.shared_memory


def test_a_quantized_cache_takes_half_the_shared_memory_for_its_tiles():
    decode = kernel_model(H100).decode(LLAMA)
    found = [tiles.shared_bytes(s, decode, "sm_90") for s in (LLAMA, changed(LLAMA, quantized=True))]
    assert found == [70 << 10, 38 << 10]


def test_a_request_of_as_many_tokens_as_a_decode_tile_holds_uses_decode(parse):
    (op,) = ops_of(select(parse(**SIZES)), FusedAttention)
    assert op.selection.policy.decode_tokens == op.selection.variants[0].max_tokens == 4


# -- costs


@given(signatures, targets)
def test_splits_are_whole_tiles_whose_own_cost_is_small(attention, target):
    kernels, figures = kernel_model(target), target.figures
    decode = kernels.decode(attention)
    keys = kernels.policy(attention, decode).split_keys
    read = keys * attention.cache.token_head_bytes / (figures.read_bandwidth_all / figures.threads)
    assert keys % decode.key_chunk == 0 and keys > 0
    assert kernels.split_seconds(attention) <= SPLIT_OVERHEAD * read * (1 + 1e-9)


def test_a_split_costs_its_states_and_one_access():
    share = 3350e9 / 132
    state = 2 * 4 * 4 * (128 + 2)
    assert kernel_model(H100).split_seconds(LLAMA) == pytest.approx(state / share + H100.figures.latency_seconds)


def test_a_padded_head_costs_as_much_as_the_next_size():
    kernels = kernel_model(H100)
    row_keys = [
        kernels.row_key_seconds(changed(LLAMA, head_size=size), kernels.prefill(LLAMA)) for size in (80, 96, 128)
    ]
    assert row_keys[0] == row_keys[1] == row_keys[2]


# -- the passes


def decided(module, target):
    pipeline.run(module, target, NAMED["chat"])
    return {remark.pass_name: remark for remark in remarks(module)}


@pytest.mark.parametrize("name", TARGETS)
def test_every_pass_decides_for_every_gpu(parse, name):
    module = parse(**SIZES)
    found = decided(module, TARGETS[name])
    (op,) = ops_of(module, FusedAttention)
    assert op.kernel.value == "attention_32x8x128_bf16_block16"
    assert all(remark.numbers and remark.alternatives for remark in found.values())


def test_blocks_are_small_where_pieces_of_any_size_stream(parse):
    remark = decided(parse(**SIZES), H100)["block-sizing"]
    assert remark.decision == "16 tokens a block"
    assert remark.numbers["kb_on_their_way_to_a_thread_block"] > remark.numbers["kb_that_hide_the_latency"]
    rates = [each["read_gb_per_s"] for each in [remark.numbers, *remark.alternatives]]
    assert rates == pytest.approx([3350] * 4)


def test_a_cpu_with_few_cores_gets_larger_blocks_and_the_numbers_say_why(parse):
    few = replace(Target.named("cpu:avx512_bf16"), cores=8)
    module = run(parse(**SIZES), BlockSizing(few, NAMED["chat"]))
    (remark,) = remarks(module)
    assert caches_of(module)["layers.0"].format.block_size > 16
    assert remark.numbers["threads_that_use_the_bandwidth"] > remark.numbers["threads"] == 8
    smallest = next(each for each in remark.alternatives if each["block_size"] == 16)
    assert smallest["read_gb_per_s"] < remark.numbers["read_gb_per_s"]


def test_nothing_is_gathered_on_a_gpu(parse):
    assert decided(parse(**SIZES), H100)["block-sizing"].numbers["gather_us"] == 0


def test_fusion_claims_no_launch_saved_on_a_gpu(parse):
    remark = decided(parse(**SIZES), H100)["attention-fusion"]
    assert remark.numbers["saved_us_per_step"] == 0 and "no launch is saved" in remark.reason


def test_a_prefix_pays_sooner_the_more_requests_share_it(parse):
    points = decided(parse(**SIZES), H100)["prefix-sharing"].numbers["break_even"]
    tokens = [float("inf") if p["from_tokens"] == "never" else p["from_tokens"] for p in points]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] < float("inf")


def test_a_prefix_beyond_l2_gains_more_than_one_that_stays_there():
    from llmir.costs.break_even import BreakEven, costs_on

    kernels = kernel_model(H100)
    prefill = kernels.prefill(LLAMA)
    costs = costs_on(H100, LLAMA, kernels.decode(LLAMA), prefill)
    even = BreakEven(LLAMA, prefill.row_tile, costs, longest=1 << 17)
    gains = [alone / shared for alone, shared in (even.nanoseconds(64, tokens) for tokens in (8192, 65536))]
    assert 8192 * LLAMA.cache.token_bytes < H100.cache_bytes(2) < 65536 * LLAMA.cache.token_bytes
    assert 1 < gains[0] < gains[1]


def test_a_selection_is_a_spec_of_gpu_variants(parse):
    (op,) = ops_of(select(parse(**SIZES)), FusedAttention)
    spec = KernelSpec(LLAMA, op.selection.isa, op.selection.variants)
    assert spec.gpu_variants == spec.variants and spec.isa == "sm_90"


def test_the_selection_s_remark_shows_shared_memory(parse):
    numbers = decided(parse(**SIZES), MI300X)["kernel-selection"].numbers
    assert max(numbers["decode_tiles_kb"], numbers["prefill_tiles_kb"]) <= numbers["shared_memory_kb"] == 64
