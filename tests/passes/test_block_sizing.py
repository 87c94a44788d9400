from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_modules import ops, run
from specs import changed

from llmir.costs.model import ModelCost
from llmir.errors import LlmirError
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import caches_of, decoder_of, ops_of
from llmir.ir.opaque import opaque
from llmir.ir.remarks import remarks
from llmir.ir.types import tensor
from llmir.ir.weight import Weight
from llmir.passes.block_sizing import BlockSizing, block_cost, cheapest
from llmir.targets.machine import Target
from llmir.targets.records import Measurements
from llmir.targets.registry import kernel_model
from llmir.workload import NAMED, Request, Workload

#: Pieces of any size are read at one speed, and products cost nothing.
FLAT = Measurements(
    read_bandwidth=10e9,
    read_bandwidth_all=20e9,
    piece_bandwidth=((1024, 20e9), (1 << 20, 20e9)),
    cached_bandwidth=((1 << 17, 20e9),),
    bf16_rate=1e18,
    f32_rate=1e18,
    fork_join_seconds=1e-5,
    threads=2,
    origin="made up: flat",
)
#: Large pieces are read much faster.
STEEP = replace(FLAT, piece_bandwidth=((1024, 0.2e9), (1 << 20, 20e9)), origin="made up: steep")
#: Products take their time.
SLOW = replace(FLAT, bf16_rate=1e11, f32_rate=5e10, origin="made up: slow")
HOST = Target.named("cpu:avx512_bf16")
SIGNATURE = AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125)
MODEL = ModelCost(weight_bytes=270e6, token_flops=270e6, bf16=True)

figures = st.builds(
    lambda found, one, scaling: Measurements(
        read_bandwidth=one,
        read_bandwidth_all=one * scaling,
        piece_bandwidth=tuple((size, 2 * size / (found + size / one)) for size in (4096, 16384, 65536, 262144)),
        cached_bandwidth=((1 << 17, one),),
        bf16_rate=1e11,
        f32_rate=5e10,
        fork_join_seconds=1e-5,
        threads=2,
        origin="drawn",
    ),
    st.floats(1e-8, 1e-5),
    st.floats(1e9, 1e11),
    st.floats(1, 8),
)
requests = st.builds(
    lambda p, o, s: Request(p, o, min(p, s)), st.integers(1, 5000), st.integers(1, 300), st.integers(0, 5000)
)
workloads = st.builds(
    lambda r, c: Workload("drawn", tuple(r), c, "drawn"), st.lists(requests, min_size=1, max_size=6), st.integers(1, 64)
)
sizes = st.sampled_from([16, 32, 64, 128, 256, 512])


def shared(tokens: int) -> Workload:
    """Requests that share a prefix of so many tokens, of a length that fills every block."""
    return Workload("shared", (Request(4095, 1, tokens),) * 4, 4, "a test")


def cost(size: int, workload: Workload = NAMED["chat"], speed: Measurements = FLAT):
    return block_cost(size, [SIGNATURE] * 30, MODEL, workload, HOST.with_measurements(speed))


def piece_bytes(size: int) -> int:
    kernels = kernel_model(HOST)
    return kernels.piece_bytes(kernels.laid_out(SIGNATURE, size))


def test_the_pass_sets_the_block_size_of_every_cache(parse):
    module = parse(windows=(0, 512))
    assert ops(module)[0].startswith('%0 = "llm.append_kv"')
    assert {cache.format.block_size for cache in caches_of(module).values()} == {128}
    run(module, BlockSizing(HOST.with_measurements(FLAT), NAMED["mixed"]))
    assert {cache.format.block_size for cache in caches_of(module).values()} == {32}
    assert {spec_of(op).cache.block_size for op in ops_of(module, PagedAttention)} == {32}


def test_where_larger_pieces_read_faster_a_block_holds_a_whole_chunk(parse):
    module = run(parse(vocabulary=64), BlockSizing(HOST.with_measurements(STEEP), NAMED["long"]))
    assert caches_of(module)["layers.0"].format.block_size == 128


def test_the_remark_holds_the_numbers_of_every_size(parse):
    (remark,) = remarks(run(parse(), BlockSizing(HOST.with_measurements(FLAT), NAMED["mixed"])))
    assert remark.decision == "32 tokens a block"
    assert (
        remark.reason.startswith("smallest within 5% of the least time: ")
        and "reading pieces of 4 KB at 20.0 GB/s" in remark.reason
    )
    assert remark.numbers["figures"] == "made up: flat" and remark.numbers["workload"] == "mixed"
    assert {a["block_size"] for a in remark.alternatives} == {64, 128}
    assert all(a["total_us"] > remark.numbers["total_us"] for a in remark.alternatives)
    for row in (remark.numbers, *remark.alternatives):
        assert row["total_us"] == pytest.approx(
            sum(row[f"{part}_us"] for part in ("read", "prefill", "gather", "padding", "recompute"))
        )


def test_the_users_block_size_stays_and_the_remark_says_what_was_better(parse):
    module = run(parse(fixed=True, block_size=128), BlockSizing(HOST.with_measurements(FLAT), NAMED["mixed"]))
    assert caches_of(module)["layers.0"].format.block_size == 128
    (remark,) = remarks(module)
    assert remark.reason.startswith("set by the user") and "llmir would have chosen 32 tokens" in remark.reason


def test_a_users_block_size_that_is_best_is_said_to_be(parse):
    module = run(parse(fixed=True, block_size=32), BlockSizing(HOST.with_measurements(FLAT), NAMED["mixed"]))
    assert remarks(module)[0].reason.endswith("llmir would have chosen the same")


def test_nothing_is_claimed_where_there_was_no_choice(parse):
    module = run(parse(fixed=True, block_size=128, allowed=(128,)), BlockSizing(HOST, NAMED["chat"]))
    assert "llmir would" not in remarks(module)[0].reason


@pytest.mark.parametrize("size", [1, 24])
def test_a_users_block_size_may_be_any(parse, size):
    module = run(parse(fixed=True, block_size=size), BlockSizing(HOST, NAMED["chat"]))
    assert caches_of(module)["layers.0"].format.block_size == size
    (remark,) = remarks(module)
    assert "gathering rows" in remark.reason and "llmir would have chosen" in remark.reason


def test_packed_blocks_are_chosen_over_rows(parse):
    module = run(parse(allowed=(1, 8, 24, 48)), BlockSizing(HOST, NAMED["chat"]))
    assert caches_of(module)["layers.0"].format.block_size == 48
    assert "gathering" not in remarks(module)[0].reason


def test_rows_are_chosen_where_nothing_else_is_allowed(parse):
    module = run(parse(allowed=(1,)), BlockSizing(HOST, NAMED["chat"]))
    assert caches_of(module)["layers.0"].format.block_size == 1


def test_gathering_counts_decoded_tokens_once_and_prompts_once_a_tile():
    workload = Workload("test", (Request(1000, 10),), 1, "a test")
    found = block_cost(1, [SIGNATURE], MODEL, workload, HOST.with_measurements(SLOW))
    keys = workload.mean_decode_tokens() + 1000 * 1001 / 2 / 10 / 32  # 96 rows of three heads: 32 tokens
    assert found.gather_seconds == pytest.approx(keys * 2 * 3 * 64 * 2 * 4 / (5e10 * 2))
    assert cost(16).gather_seconds == 0


def test_rows_are_read_as_many_at_a_time_as_are_asked_for_ahead():
    assert [piece_bytes(size) for size in (1, 24)] == [16 * 128] * 2


def test_no_size_left_is_an_error_that_names_the_allowed_ones(parse):
    with pytest.raises(LlmirError, match=r"vllm 0\.32\.0 allows \(0\) holds a token"):
        run(parse(allowed=(0,)), BlockSizing(HOST, NAMED["chat"]))


def test_a_model_without_attention_is_an_error(parse):
    nothing = '%out{n} = "llm.elementwise"(%q) {{function = "silu"}} : (!q) -> !q'
    with pytest.raises(LlmirError, match="tiny has no attention over a paged KV cache"):
        run(parse(layer=nothing), BlockSizing(HOST, NAMED["chat"]))


@given(sizes, workloads, figures)
def test_costs_are_finite_and_their_parts_sane(size, workload, speed):
    found = cost(size, workload, speed)
    assert 0 < found.seconds < float("inf")
    assert 0 <= found.padding_share < 1
    assert found.padding_bytes <= workload.concurrency * (size - 1) * 30 * 2 * 3 * 64 * 2
    assert 0 < found.read_bandwidth <= speed.read_bandwidth_all * (1 + 1e-9)
    assert 0 <= found.recomputed_tokens <= (size - 1) / 2


@given(workloads, figures)
def test_doubling_a_block_never_reads_slower_and_never_recomputes_less(workload, speed):
    found = [cost(size, workload, speed) for size in (16, 32, 64, 128, 256, 512)]
    for small, large in pairwise(found):
        assert large.read_seconds <= small.read_seconds * (1 + 1e-9)
        assert large.recomputed_tokens >= small.recomputed_tokens
        assert large.padding_share >= small.padding_share * (1 - 1e-9)


@given(workloads, figures)
def test_the_chosen_size_cannot_be_told_from_the_least_and_no_smaller_one_could(workload, speed):
    found = [cost(size, workload, speed) for size in (32, 48, 64, 128)]
    most = 1.05 * min(each.seconds for each in found)
    chosen = cheapest(found)
    assert chosen.seconds <= most
    assert all(each.seconds > most for each in found if each.block_size < chosen.block_size)


def test_sizes_that_figures_cannot_tell_apart_give_the_smallest_block(parse):
    steep = run(parse(vocabulary=64), BlockSizing(HOST.with_measurements(replace(STEEP, error=0.9)), NAMED["long"]))
    assert caches_of(steep)["layers.0"].format.block_size == 64  # 128 where they are exact
    assert remarks(steep)[0].reason.startswith("smallest within 90% of the least time: ")


def test_equal_costs_give_the_smallest_block():
    found = [replace(cost(32), block_size=size) for size in (128, 32, 64)]
    assert cheapest(found).block_size == 32


def test_a_flat_machine_makes_padding_decide():
    assert cheapest([cost(size, NAMED["mixed"]) for size in (32, 64, 128)]).block_size == 32


def test_a_shared_prefix_is_charged_by_the_computing_of_half_a_block():
    found = cost(128, shared(2048), SLOW)
    starts_per_step = 4 / 1
    token_seconds = 270e6 / (1e11 * 2)
    assert found.recompute_seconds == pytest.approx(starts_per_step * 63.5 * token_seconds)


def test_sharing_prefixes_makes_small_blocks_the_fastest():
    strides = replace(SLOW, piece_bandwidth=((4096, 8e9), (8192, 12e9), (16384, 20e9)))

    def fastest(shared_tokens):
        return min((32, 64, 128), key=lambda size: cost(size, shared(shared_tokens), strides).seconds)

    assert (fastest(0), fastest(4095)) == (128, 32)


def test_a_window_bounds_what_is_read():
    windowed = changed(SIGNATURE, window=256)
    full, part = (
        block_cost(64, [layer], MODEL, NAMED["long"], HOST.with_measurements(FLAT)) for layer in (SIGNATURE, windowed)
    )
    assert part.read_seconds == pytest.approx(full.read_seconds * 256 / NAMED["long"].mean_decode_tokens())


def test_larger_chunks_take_fewer_softmax_steps_in_prefill():
    found = [cost(size, NAMED["long"], SLOW).prefill_seconds for size in (16, 128, 256, 80, 48)]
    products = found[0] / (1 + 8 / 128)
    assert found == pytest.approx([products * (1 + 8 / chunk) for chunk in (128, 128, 128, 80, 96)])


def test_prefill_counts_the_products_of_queries_with_keys_and_of_probabilities_with_values():
    workload = Workload("test", (Request(1000, 10),), 1, "a test")
    found = block_cost(128, [SIGNATURE], MODEL, workload, HOST.with_measurements(SLOW))
    flops = 2 * 2 * 9 * 64 * (1000 * 1001 / 2)
    assert found.prefill_seconds == pytest.approx(flops / 10 * (1 + 8 / 128) / (2 * 1e11))


def test_decode_reads_a_chunks_keys_at_a_time_or_a_piece_of_them():
    assert [piece_bytes(size) for size in (32, 64, 128)] == [4096, 8192, 16384]
    narrow = kernel_model(Target.named("cpu:avx2"))
    assert [narrow.piece_bytes(narrow.laid_out(SIGNATURE, size)) for size in (32, 64, 128)] == [4096, 8192, 8192]


def test_the_models_cost_counts_the_weights_it_reads(parse):
    found = ModelCost.of(parse(vocabulary=1000))
    assert (found.weight_bytes, found.token_flops, found.bf16) == (2 * 576 * 1000, 2 * 576 * 1000, True)


def test_the_models_cost_counts_the_weights_of_opaque_layers_whole(parse):
    module = parse(vocabulary=1000)
    with module.context, ir.Location.unknown(), ir.InsertionPoint.at_block_begin(decoder_of(module).entry_block):
        opaque("some.Experts", [], [], weights=[Weight.build("experts", tensor([8, 64, 576], "i4"))])
    found = ModelCost.of(module)
    assert (found.weight_bytes, found.token_flops) == (2 * 576 * 1000 + 8 * 64 * 576 / 2, 2 * 576 * 1000)
