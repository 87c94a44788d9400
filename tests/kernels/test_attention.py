"""Compiled attention and append_kv against the float64 reference, on every instruction set this machine has."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch  # noqa: F401 - brings the OpenMP runtime
from attention_cases import (
    HEAD_SIZES,
    RUNNABLE_ISAS,
    SHARED,
    Batch,
    Inputs,
    attend,
    batches,
    bidirectional,
    check,
    layout_of,
    loaded,
    policies,
    spec_of,
    specs,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specs import changed

from llmir.errors import KernelError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import StepPolicy
from llmir.kernels.cpu.lowering import compile_object
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.targets.registry import lanes_of

NO_SPLITS = StepPolicy(decode_tokens=1, split_keys=1 << 20, items_per_thread=1)
SPLITS = StepPolicy(decode_tokens=1, split_keys=32, items_per_thread=100)
KINDS = [(isa, element_type) for isa in RUNNABLE_ISAS for element_type in ("bf16", "f16", "f32")]


def signature(
    isa=RUNNABLE_ISAS[0], element_type="bf16", head_size=64, num_heads=6, num_kv_heads=2, block_size=64, **more
):
    layout = layout_of(element_type, isa, block_size)
    return AttentionSpec.dense(
        num_heads, num_kv_heads, head_size, element_type, block_size, head_size**-0.5, layout=layout, **more
    )


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(spec=specs(), steps=st.lists(batches(), min_size=2, max_size=4), policy=policies)
def test_any_kernel_computes_any_step(spec, steps, policy):
    runner = CpuAttentionRunner(loaded(spec), policy)
    for batch in steps:
        check(spec, batch, policy, runner)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize(("head_size", "value_size"), HEAD_SIZES)
def test_mixed_batch(isa, element_type, head_size, value_size):
    spec = spec_of(signature(isa, element_type, head_size, value_size=value_size), isa)
    check(spec, Batch(cached=(100, 0, 63, 7), new=(1, 70, 1, 33)), NO_SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
def test_splits_are_merged(isa, element_type):
    spec = spec_of(signature(isa, element_type), isa)
    check(spec, Batch(cached=(700, 40), new=(1, 20), threads=2), SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
def test_error_does_not_grow_with_the_cache(isa, element_type):
    spec = spec_of(signature(isa, element_type), isa)
    error = check(spec, Batch(cached=(8191, 8000), new=(1, 1)), NO_SPLITS)
    assert error < {"bf16": 2.6e-3, "f16": 4e-4, "f32": 3e-6}[element_type]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3), (8, 1), (7, 7), (14, 2)])
def test_grouped_queries(num_heads, num_kv_heads):
    s = signature(num_heads=num_heads, num_kv_heads=num_kv_heads)
    check(spec_of(s, RUNNABLE_ISAS[0]), Batch(cached=(90, 5), new=(1, 17)), NO_SPLITS)


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 1000])
def test_window(isa, window):
    s = signature(isa, "f32", window=window)
    check(spec_of(s, isa), Batch(cached=(300, 64, 0), new=(1, 40, 10)), NO_SPLITS)


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("sharpness", [1.0, 100.0])
def test_soft_cap(isa, sharpness):
    s = signature(isa, "f32", soft_cap=5.0)
    check(spec_of(s, isa), Batch(cached=(100,), new=(20,), sharpness=sharpness), NO_SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize("more", [{"sinks": True}, {"alibi": True}, {"alibi": True, "sinks": True, "soft_cap": 30.0}])
@pytest.mark.parametrize("window", [0, 77])
def test_sinks_and_alibi(isa, element_type, more, window):
    s = signature(isa, element_type, window=window, **more)
    batch = Batch(cached=(700, 40, 0), new=(1, 20, 3), threads=2)
    for policy in (NO_SPLITS, SPLITS):
        check(spec_of(s, isa), batch, policy)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize("window", [0, 1, 77])
@pytest.mark.parametrize("more", [{}, {"sinks": True, "soft_cap": 30.0}])
def test_bidirectional_attention(isa, element_type, window, more):
    spec = spec_of(bidirectional(signature(isa, element_type, window=window, **more)), isa)
    for policy in (NO_SPLITS, SPLITS):
        check(spec, Batch(cached=(0, 0, 0, 60), new=(300, 1, 77, 9), threads=2), policy)


def test_a_sink_takes_all_weight_where_no_score_comes_near():
    s = signature(element_type="f32", sinks=True)
    inputs = Inputs(s, Batch(cached=(60,), new=(2,)))
    inputs.sinks = np.full(s.num_heads, 1e4, np.float32)
    assert (attend(spec_of(s, RUNNABLE_ISAS[0]), inputs, NO_SPLITS) == 0).all()


def test_a_sink_takes_no_weight_where_it_is_least():
    s, plain = (signature(element_type="f32", sinks=sinks) for sinks in (True, False))
    inputs, without = (Inputs(spec, Batch(cached=(60,), new=(2,))) for spec in (s, plain))
    inputs.sinks = np.full(s.num_heads, -np.inf, np.float32)
    one, two = (attend(spec_of(i.attention, RUNNABLE_ISAS[0]), i, NO_SPLITS) for i in (inputs, without))
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("block_size", [64, 1])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31, 32, 63, 64, 65, 127, 129])
def test_lengths_around_vectors_chunks_and_blocks(isa, block_size, length):
    spec = spec_of(signature(isa, block_size=block_size), isa)
    check(spec, Batch(cached=(length - 1,), new=(1,)), NO_SPLITS)
    check(spec, Batch(cached=(0,), new=(length,)), NO_SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize(("head_size", "value_size"), [(40, 32), (80, 80), (192, 128)])
def test_blocks_of_one_token(isa, element_type, head_size, value_size):
    spec = spec_of(signature(isa, element_type, head_size, value_size=value_size, block_size=1), isa)
    check(spec, Batch(cached=(100, 0, 63, 7), new=(1, 70, 1, 33)), NO_SPLITS)


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("block_size", [2, 3, 8, 24])
def test_rows_with_a_window_and_splits(isa, block_size):
    s = signature(isa, block_size=block_size, window=77).with_cache(layout="row")
    check(spec_of(s, isa), Batch(cached=(700, 40, 0), new=(1, 20, 1), threads=2), SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("key_vectors", [1, 4])
def test_chunks_of_several_pages(isa, element_type, block_size, key_vectors):
    s = signature(isa, element_type, head_size=80, block_size=block_size, window=150)
    tile = max(key_vectors * lanes_of(isa), s.cache.key_group(lanes_of(isa)))
    variants = [
        dataclasses.replace(v, key_chunk=128, key_vectors=tile // lanes_of(isa), prefetch=16)
        for v in spec_of(s, isa).variants
    ]
    batch = Batch(cached=(700, 0, 63, 130, 16), new=(1, 70, 1, 33, 1), threads=2)
    check(dataclasses.replace(spec_of(s, isa), variants=tuple(variants)), batch, SPLITS)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize("ahead", [16, 32, 64])
@pytest.mark.parametrize("window", [0, 150])
def test_a_page_read_in_pieces(isa, element_type, ahead, window):
    """All rows in one tile and the head in several parts: each piece of values is finished before the next."""
    s = signature(isa, element_type, head_size=80, window=window)
    variants = [
        dataclasses.replace(
            v, row_tile=s.queries_per_kv, key_chunk=128, key_vectors=16 // lanes_of(isa), prefetch=ahead
        )
        for v in spec_of(s, isa).variants
    ]
    batch = Batch(cached=(700, 0, 63, 130, 16), new=(1, 70, 1, 33, 1), threads=2)
    check(dataclasses.replace(spec_of(s, isa), variants=tuple(variants)), batch, SPLITS)


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
def test_the_layout_does_not_change_the_result(isa):
    packed, rows = signature(isa), signature(isa).with_cache(layout="row")
    batch = Batch(cached=(700, 40), new=(1, 20))
    assert check(spec_of(packed, isa), batch, NO_SPLITS) == check(spec_of(rows, isa), batch, NO_SPLITS)


#: Two roots, two levels, and a request that shares nothing.
TREE = Batch(
    cached=(300, 310, 290, 50, 400, 333, 500, 410),
    new=(1, 1, 2, 1, 1, 1, 1, 3),
    threads=2,
    prefixes=((0, 0), (0, 192), (1, 288), (3, 0), (0, 128), (4, 320), (6, 0), (6, 400)),
)


@pytest.mark.parametrize(("isa", "element_type"), KINDS)
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_shared_prefixes_are_read_once(isa, element_type, block_size):
    s = signature(isa, element_type, block_size=block_size)
    spec = spec_of(s, isa)
    check(spec, TREE, dataclasses.replace(NO_SPLITS, sharing=SHARED))
    check(spec, TREE, dataclasses.replace(SPLITS, sharing=SHARED))


@pytest.mark.parametrize(
    "more", [{"window": 300}, {"window": 40}, {"soft_cap": 3.0}, {"sinks": True}, {"alibi": True, "value_size": 32}]
)
def test_shared_prefixes_of_other_attention(more):
    s = signature(element_type="f32", block_size=16, **more)
    check(spec_of(s, RUNNABLE_ISAS[0]), TREE, dataclasses.replace(SPLITS, sharing=SHARED))
    check(spec_of(s, RUNNABLE_ISAS[0], decode_tokens=3), TREE, StepPolicy(3, 64, 4, SHARED))


def test_sharing_changes_no_more_than_rounding():
    spec = spec_of(signature(element_type="f32", block_size=16), RUNNABLE_ISAS[0])
    inputs = Inputs(spec.attention, TREE)
    alone, shared = (attend(spec, inputs, dataclasses.replace(NO_SPLITS, sharing=costs)) for costs in (None, SHARED))
    np.testing.assert_allclose(alone, shared, rtol=1e-4, atol=1e-6)
    assert (alone != shared).any()


@given(order=st.permutations(range(8)))
@settings(deadline=None, max_examples=20)
def test_requests_in_another_order_give_the_same_outputs_in_that_order(order):
    spec = spec_of(signature(element_type="f32", block_size=16), RUNNABLE_ISAS[0])
    policy = dataclasses.replace(NO_SPLITS, sharing=SHARED)
    inputs = Inputs(spec.attention, TREE)
    outputs = np.split(attend(spec, inputs, policy), inputs.query_start[1:-1])
    again = attend(spec, inputs.permuted(order), policy)
    np.testing.assert_allclose(again, np.concatenate([outputs[i] for i in order]), rtol=1e-4, atol=1e-6)


def test_step_of_no_new_tokens_in_some_requests():
    check(spec_of(signature(), RUNNABLE_ISAS[0]), Batch(cached=(50, 30, 9), new=(0, 1, 0)), NO_SPLITS)


def test_many_threads_share_few_items():
    check(spec_of(signature(), RUNNABLE_ISAS[0]), Batch(cached=(30,), new=(1,), threads=8), NO_SPLITS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 7}, "num_heads is 7, and must be a multiple of num_kv_heads, 2"),
        ({"head_size": 76}, "head size is 76"),
        ({"layout": "logical"}, "layout is 'logical'"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"block_size": 80}, "must divide the block size 80, or be a multiple of it"),
        ({"block_size": 4}, "block_size is 4, and must hold whole groups of .* keys"),
    ],
)
def test_what_cannot_be_generated_is_named(change, words):
    s = changed(signature(), **change)
    with pytest.raises(KernelError, match=words):
        compile_object(spec_of(s, RUNNABLE_ISAS[0]))
