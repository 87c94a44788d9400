from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pass_modules import run

from llmir.costs.break_even import BATCHES, BreakEven, costs_on
from llmir.costs.sharing import Readers, cached_key
from llmir.errors import LlmirError
from llmir.ir import build
from llmir.ir.attention import FusedAttention, Kernel, PagedAttention, step_policy
from llmir.ir.attention_spec import AttentionSpec, Mask, SoftCap
from llmir.ir.bindings import func, ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dialect import context
from llmir.ir.dtypes import QUERY_DTYPES
from llmir.ir.module import ModelInfo, decoder, new_module, ops_of
from llmir.ir.opaque import opaque
from llmir.ir.remarks import remarks
from llmir.ir.types import PagedKVCache, tensor
from llmir.ir.weight import Weight
from llmir.passes.attention_fusion import AttentionFusion
from llmir.passes.kernel_outlining import KernelOutlining
from llmir.passes.kernel_selection import KernelSelection
from llmir.passes.prefix_sharing import DataFlow, PrefixSharing, assumption, obstacle
from llmir.targets.machine import Target
from llmir.targets.registry import head_sizes
from llmir.targets.x86 import tiles
from llmir.targets.x86.isa import INSTRUCTION_SETS

BEST = Target.named("cpu:avx512_bf16")
SMOLLM2 = AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125, layout="pair")


# -- whether it may


def weight(name, *shape):
    return Weight.build(name, tensor(shape, "bf16"))


class Layers:
    """A decoder under construction, layer by layer: 4 query heads on 2 KV heads of 64."""

    def __init__(self, decoder):
        self.decoder = decoder
        self.x = build.embedding(decoder.input_ids, weight("table", 1000, 256))
        self.cache_type = PagedKVCache.build(CacheFormat("bf16", 2, 64, 64, block_size=32), max_length=8192)

    def encoder(self):
        """Hidden states of other tokens."""
        return self.decoder.input("encoder_states", tensor([None, 256], "bf16"))

    def project(self, x, heads, turned=False):
        value = build.linear(x, weight("projection", heads * 64, 256))
        if turned:
            value = build.rope(self.decoder.positions, value, head_size=64, base=1e4)
        return build.reshape(value, [None, heads, 64])

    def append(self, layer, keys_of=None, cache=None, turned=True):
        """The layer's cache (or ``cache``) with the keys of the tokens so far (or ``keys_of``) in it."""
        keys_of = self.x if keys_of is None else keys_of
        key, value = self.project(keys_of, 2, turned), self.project(keys_of, 2)
        cache = self.decoder.cache(layer, self.cache_type) if cache is None else cache
        return build.append_kv(cache, key, value, self.decoder.slots, layer=layer)

    def attend(self, layer, cache, turned=True, block_table=None, **options):
        d = self.decoder
        block_table = d.block_table if block_table is None else block_table
        query = self.project(self.x, 4, turned)
        step = (block_table, d.query_start, d.sequence_lengths)
        self.x = build.reshape(
            build.paged_attention(query, cache, *step, **{"layer": layer, "scale": 0.125, **options}), [None, 256]
        )


@pytest.fixture
def module_of():
    """``module_of(make)``: the module that ``make(layers)`` builds."""
    with context(), ir.Location.unknown():

        def module_of(make):
            module = new_module(ModelInfo("vllm 0.32.0", "tiny", allowed_block_sizes=(32,)))
            with decoder(module) as d:
                layers = Layers(d)
                make(layers)
                d.output(layers.x)
            return module

        yield module_of


def obstacles(module):
    """By layer."""
    flow = DataFlow(module.operation)
    return {op.layer.value: obstacle(op, flow) for op in ops_of(module, FusedAttention, PagedAttention)}


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_causal_attention_over_its_own_keys_may(module_of, turned, fused):
    def make(layers):
        for name in ("a", "b"):
            layers.attend(name, layers.append(name, turned=turned), turned=turned)

    module = module_of(make)
    if fused:
        run(module, AttentionFusion(BEST))
    assert obstacles(module) == {"a": None, "b": None}


@pytest.mark.parametrize("options", [{"mask": Mask(window=512)}, {"score_stages": [SoftCap(30.0)]}])
def test_a_window_or_a_soft_cap_is_no_obstacle(module_of, options):
    module = module_of(lambda layers: layers.attend("a", layers.append("a"), **options))
    assert obstacles(module) == {"a": None}


def test_attention_that_is_not_causal_may_not(module_of):
    module = module_of(lambda layers: layers.attend("a", layers.append("a"), mask=Mask(causal=False)))
    assert "not causal" in obstacles(module)["a"]


@pytest.mark.parametrize("fused", [True, False])
def test_keys_of_other_tokens_than_the_queries_are_cross_attention(module_of, fused):
    def make(layers):
        encoder = layers.encoder()
        for name in ("a", "b"):
            layers.attend(name, layers.append(name))
            layers.attend(f"{name}.cross", layers.append(f"{name}.cross", keys_of=encoder))

    module = module_of(make)
    if fused:
        run(module, AttentionFusion(BEST))
    found = obstacles(module)
    assert (found["a"], found["b"]) == (None, None)
    for name in ("a.cross", "b.cross"):
        assert "input_ids" in found[name] and "cross-attention" in found[name]


def test_a_cache_that_the_decoder_does_not_write_is_cross_attention(module_of):
    module = module_of(lambda layers: layers.attend("a", layers.decoder.cache("a", layers.cache_type)))
    assert "does not write its cache" in obstacles(module)["a"]


def test_a_block_table_of_its_own_may_not(module_of):
    def make(layers):
        table = layers.decoder.input("encoder_block_table", tensor([None, None], "i32"))
        layers.attend("a", layers.append("a"), block_table=table)

    assert "encoder_block_table" in obstacles(module_of(make))["a"]


def test_keys_that_are_not_turned_before_they_are_written_are_not_final(module_of):
    module = module_of(lambda layers: layers.attend("a", layers.append("a", turned=False), turned=True))
    assert "not final" in obstacles(module)["a"]


def assumed(module):
    """What is taken for granted, by layer."""
    flow = DataFlow(module.operation)
    return {op.layer.value: assumption(op, flow) for op in ops_of(module, PagedAttention)}


def test_what_happens_to_keys_in_an_opaque_layer_is_left_to_prefix_caching(module_of):
    def make(layers):
        d = layers.decoder
        key, value = layers.project(layers.x, 2), layers.project(layers.x, 2)
        [key] = opaque("some.Rotary", [d.positions, key], [key.type])
        cache = build.append_kv(d.cache("a", layers.cache_type), key, value, d.slots, layer="a")
        layers.attend("a", cache, turned=True)
        layers.attend("b", layers.append("b"))

    module = module_of(make)
    assert obstacles(module) == {"a": None, "b": None}
    assert assumed(module)["a"].startswith("its keys come through some.Rotary, which the IR has no op for")
    assert assumed(module)["b"] is None, "a projection and a rotary embedding that were seen lie behind its keys"


def test_keys_of_an_opaque_layer_that_are_seen_to_turn_are_final(module_of):
    def make(layers):
        [x] = opaque("quantized.Linear", [layers.x], [tensor([None, 128], "bf16")])
        d = layers.decoder
        key = build.reshape(build.rope(d.positions, x, head_size=64, base=1e4), [None, 2, 64])
        cache = build.append_kv(d.cache("a", layers.cache_type), key, key, d.slots, layer="a")
        layers.attend("a", cache)

    module = module_of(make)
    assert (obstacles(module), assumed(module)) == ({"a": None}, {"a": None})


def test_keys_that_come_from_nowhere_are_left_to_prefix_caching(module_of):
    def make(layers):
        d = layers.decoder
        key = d.input("a.key", tensor([None, 2, 64], "bf16"))
        layers.attend("a", build.append_kv(d.cache("a", layers.cache_type), key, key, d.slots, layer="a"))

    module = module_of(make)
    assert assumed(module)["a"].startswith("where its keys come from was not seen")


def test_keys_turned_in_one_op_with_the_queries_are_final(module_of):
    def make(layers):
        d = layers.decoder
        both = build.linear(layers.x, weight("qkv", 512, 256))
        query, key, value = build.split(both, [256, 128, 128])
        query, key = build.rope(d.positions, query, key, head_size=64, base=1e4)
        query, key, value = (build.reshape(x, [None, n, 64]) for x, n in ((query, 4), (key, 2), (value, 2)))
        cache = build.append_kv(d.cache("a", layers.cache_type), key, value, d.slots, layer="a")
        step = (d.block_table, d.query_start, d.sequence_lengths)
        layers.x = build.reshape(build.paged_attention(query, cache, *step, layer="a", scale=0.125), [None, 256])

    assert obstacles(module_of(make)) == {"a": None}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("window", {"mask": Mask(window=512)}),
        ("score stages", {"score_stages": [SoftCap(30.0)]}),
        ("causal", {"mask": Mask(causal=False)}),
    ],
)
def test_a_cache_seen_through_two_masks_may_not(module_of, name, options):
    def make(layers):
        cache = layers.append("a")
        layers.attend("a", cache)
        layers.attend("b", cache, **options)

    found = obstacles(module_of(make))
    assert "shares its cache with b" in found["a"] and name in found["a"]
    assert found["b"] is not None


def test_of_a_cache_seen_through_one_mask_the_layer_that_writes_it_may(module_of):
    def make(layers):
        cache = layers.append("a")
        layers.attend("a", cache, mask=Mask(window=512))
        layers.attend("b", cache, mask=Mask(window=512))

    found = obstacles(module_of(make))
    assert found["a"] is None and "written by a" in found["b"]


def test_a_cache_that_another_layer_writes_too_may_not(module_of):
    def make(layers):
        cache = layers.append("a")
        layers.attend("a", cache)
        layers.attend("b", layers.append("b", cache=cache))

    found = obstacles(module_of(make))
    assert "written by b" in found["a"] and "written by a" in found["b"]


def test_a_cache_that_something_else_takes_may_not(module_of):
    def make(layers):
        cache = layers.append("a")
        turned = func.CallOp([cache.type], "turn_keys", [cache]).result
        layers.attend("a", turned)

    assert "func.call takes its cache" in obstacles(module_of(make))["a"]


# -- the pass


def shared(module, target=BEST, **options):
    return run(module, AttentionFusion(target), KernelSelection(target), PrefixSharing(target, **options))


def remark_of(module):
    return next(remark for remark in remarks(module) if remark.pass_name == "prefix-sharing")


def test_the_pass_adds_costs_to_the_policy_and_leaves_the_rest(parse):
    module = run(parse(), AttentionFusion(BEST), KernelSelection(BEST))
    (before,) = (op.selection for op in ops_of(module, FusedAttention))
    assert before.policy.sharing is None
    run(module, PrefixSharing(BEST))
    (after,) = (op.selection for op in ops_of(module, FusedAttention))
    assert (after.isa, after.variants) == (before.isa, before.variants)
    assert replace(after.policy, sharing=None) == before.policy and after.policy.sharing is not None


def test_switched_off_by_the_user(parse):
    module = shared(parse(), allowed=False)
    assert [op.selection.policy.sharing for op in ops_of(module, FusedAttention)] == [None]
    remark = remark_of(module)
    assert (remark.decision, remark.reason) == ("read by each request for itself", "switched off by the user")


def test_without_a_selection_it_says_which_pass_is_missing(parse):
    with pytest.raises(LlmirError, match=r"layers\.0.*run kernel-selection first"):
        run(parse(), AttentionFusion(BEST), PrefixSharing(BEST))


def test_layers_of_one_signature_of_which_one_may_not_get_kernels_apart(module_of):
    def make(layers):
        layers.attend("a", layers.append("a"))
        layers.attend("cross", layers.append("cross", keys_of=layers.encoder()))
        layers.attend("b", layers.append("b"))

    module = run(shared(module_of(make)), KernelOutlining())
    kernels = {op.sym_name.value: step_policy(op).sharing is not None for op in ops_of(module, Kernel)}
    assert kernels == {"attention_4x2x64_bf16_block32": True, "attention_4x2x64_bf16_block32_1": False}
    called = {op.layer.value: op.kernel.value for op in ops_of(module, FusedAttention)}
    assert [kernels[called[layer]] for layer in ("a", "cross", "b")] == [True, False, True]
    subjects = {r.subject: r.decision for r in remarks(module) if r.pass_name == "prefix-sharing"}
    assert subjects["cross"] == "read by each request for itself"
    assert subjects["2 layers (a to b)"].startswith("read once")


def test_a_window_shorter_than_the_break_even_shares_nothing(parse):
    module = shared(parse(windows=(64,)))
    assert [op.selection.policy.sharing for op in ops_of(module, FusedAttention)] == [None]
    assert "pays nowhere up to 63 tokens" in remark_of(module).reason


def test_of_a_window_only_what_every_request_sees_is_shared(parse):
    module = shared(parse(windows=(512,)))
    assert [op.selection.policy.sharing is not None for op in ops_of(module, FusedAttention)] == [True]
    assert "of a window of 512 tokens, what lies within that of every request" in remark_of(module).reason


def test_the_curve_in_the_remark_is_that_of_the_policy(parse):
    module = shared(parse())
    (op,) = ops_of(module, FusedAttention)
    costs, numbers = op.selection.policy.sharing, remark_of(module).numbers
    tile = next(variant.row_tile for variant in op.selection.variants if variant.name == "prefill")
    assert [point["decoding_requests"] for point in numbers["break_even"]] == list(BATCHES)
    paying = [point for point in numbers["break_even"] if point["from_tokens"] != "never"]
    for point in paying:
        rows = np.full(point["decoding_requests"], 3)
        assert point["rows"] == rows.sum()
        assert Readers(costs, rows, tile).share(point["from_tokens"])
        assert not Readers(costs, rows, tile).share(point["from_tokens"] - op.cache.type.format.block_size)
        assert point["from_kb_a_layer"] == point["from_tokens"] * 3 * 256 / 1024
        assert point["gain_at_4k"] * costs.margin >= 1
    assert costs.least_tokens == min(point["from_tokens"] for point in paying)


def test_a_batch_that_never_gains_is_said_to_gain_nothing():
    # Products are slow, and the rows of few requests fill no tile.
    slow = BEST.with_measurements(replace(BEST.figures, bf16_rate=1e9, f32_rate=1e9))
    curve = even(AttentionSpec.dense(4, 4, 64, "bf16", 32, 0.125, layout="pair"), slow)
    point = curve.point(2)
    assert (point["from_tokens"], point["gain_at_4k"]) == ("never", 1.0) and "from_kb_a_layer" not in point
    assert curve.point(32)["gain_at_4k"] > 1


# -- what it costs


def costs_of(attention=SMOLLM2, target=BEST):
    isa = target.isa
    return costs_on(target, attention, tiles.decode_variant(attention, isa), tiles.prefill_variant(attention, isa))


def even(attention=SMOLLM2, target=BEST):
    prefill = tiles.prefill_variant(attention, target.isa)
    return BreakEven(attention, prefill.row_tile, costs_of(attention, target), longest=1 << 17)


@given(
    st.builds(
        lambda kv, group, size, element, block: AttentionSpec.dense(kv * group, kv, size, element, block, 0.125),
        st.integers(1, 16),
        st.integers(1, 64),
        st.sampled_from(head_sizes(on_gpu=False)),
        st.sampled_from(QUERY_DTYPES),
        st.sampled_from([1, 5, 16, 32, 128]),
    ),
    st.sampled_from(list(INSTRUCTION_SETS)),
)
def test_costs_are_such_that_the_run_time_can_use_them(attention, isa):
    attention = attention.with_cache(layout=tiles.layout(isa, attention.dtype, attention.cache.block_size))
    costs = costs_of(attention, Target.named(f"cpu:{isa}"))
    tokens, times = zip(*costs.cached_key, strict=True)
    assert list(tokens) == sorted(set(tokens)) and list(times) == sorted(times)
    assert times[0] > 0 and times[-1] <= costs.read_key
    assert costs.tile_key > 0 and costs.row > 0 and 0 < costs.margin < 1
    assert costs.least_tokens >= attention.cache.block_size
    assert 0 < costs.most_rows <= max(tiles.PREFILL_ROWS, attention.queries_per_kv) / 2


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("requests", BATCHES)
def test_once_it_pays_it_pays_for_every_longer_part(isa, requests):
    attention = SMOLLM2.with_cache(layout=tiles.layout(isa, "bf16", 128))
    curve = even(attention, Target.named(f"cpu:{isa}"))
    tile = curve.row_tile
    found = [Readers(curve.costs, np.full(requests, 3), tile).share(tokens) for tokens in range(128, 1 << 15, 128)]
    least = curve.tokens(requests)
    assert found == [least is not None and tokens >= least for tokens in range(128, 1 << 15, 128)]


def test_what_has_to_fit_in_a_cache_is_the_part_of_all_kv_heads():
    figures = replace(BEST.figures, cached_bandwidth=((1 << 20, 1e13), (4 << 20, 1e12)))
    one, four = (
        costs_of(AttentionSpec.dense(4 * kv, kv, 64, "bf16", 32, 0.125, layout="pair"), BEST.with_measurements(figures))
        for kv in (1, 4)
    )
    assert cached_key(one, 4096) == cached_key(four, 1024) < cached_key(four, 4096)


def test_what_was_read_just_now_is_never_slower_than_from_memory():
    slow = replace(BEST.figures, cached_bandwidth=((1 << 17, 1e6), (1 << 26, 1e5)))
    costs = costs_of(target=BEST.with_measurements(slow))
    assert {time for _, time in costs.cached_key} == {costs.read_key}


def test_a_working_set_is_read_as_fast_as_any_larger_one():
    disturbed = replace(BEST.figures, cached_bandwidth=((1 << 20, 4e12), (2 << 20, 1e9), (4 << 20, 2e12)))
    calm = replace(BEST.figures, cached_bandwidth=((1 << 20, 4e12), (2 << 20, 2e12), (4 << 20, 2e12)))
    assert costs_of(target=BEST.with_measurements(disturbed)) == costs_of(target=BEST.with_measurements(calm))


def test_larger_caches_make_sharing_worth_less():
    cold = replace(BEST.figures, cached_bandwidth=((1 << 17, BEST.figures.read_bandwidth_all),))
    in_memory, in_caches = even(target=BEST.with_measurements(cold)), even()
    for requests in BATCHES:
        assert in_memory.nanoseconds(requests, 4096)[0] > in_caches.nanoseconds(requests, 4096)[0]
        assert in_memory.nanoseconds(requests, 4096)[1] == in_caches.nanoseconds(requests, 4096)[1]


def test_gathered_rows_are_gathered_by_everybody_who_reads_them():
    rows = SMOLLM2.with_cache(layout="row")
    gather = 256 * tiles.GATHER_FLOPS / BEST.figures.f32_rate * 1e9
    assert costs_of(rows).cached_key[0][1] == pytest.approx(costs_of().cached_key[0][1] + gather)


def test_a_part_shorter_than_a_chunk_is_not_shared():
    assert costs_of(SMOLLM2.with_cache(block_size=16)).least_tokens == 128
