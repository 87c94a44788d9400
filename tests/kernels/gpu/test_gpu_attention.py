"""The GPU programs, in Triton's interpreter, against the float64 definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gpu_cases import ALWAYS_SHARED, Case, attention, variants

from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.kernels.gpu.programs import MERGE_PARTS, programs
from llmir.kernels.work_list import Item
from llmir.runtime import gpu
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.step import Step

RAGGED = [(0, 1), (1, 1), (15, 1), (16, 1), (63, 1), (100, 1)]
MIXED = [(40, 1), (0, 37), (33, 20), (90, 1), (0, 5)]


@pytest.mark.parametrize("element_type", ["bf16", "f16"])
@pytest.mark.parametrize("requests", [RAGGED, MIXED], ids=["decode", "mixed"])
def test_every_type_in_decode_and_mixed_steps(requests, element_type):
    Case(requests, attention(dtype=element_type)).check()


@pytest.mark.parametrize("head_size", [32, 64, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_size(head_size):
    Case([(50, 1), (0, 20)], attention(head_size=head_size, scale=head_size**-0.5)).check()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (7, 1), (14, 2), (8, 1), (32, 1)])
def test_every_grouping_of_heads(heads, kv_heads):
    Case([(50, 1), (3, 9)], attention(num_heads=heads, num_kv_heads=kv_heads)).check()


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_every_relation_of_block_and_tile(block_size):
    Case([(130, 1), (70, 20)], attention(block_size=block_size)).check()


@pytest.mark.parametrize("window", [1, 7, 32, 50, 1000])
def test_windows(window):
    Case([(130, 1), (40, 37), (0, 50)], attention(window=window)).check()


@pytest.mark.parametrize("soft_cap", [0.5, 30.0])
def test_soft_caps(soft_cap):
    Case(MIXED, attention(soft_cap=soft_cap)).check()


@pytest.mark.parametrize("split_keys", [32, 1 << 20], ids=["split", "whole"])
def test_sinks(split_keys):
    Case(MIXED, attention(sinks=True), split_keys=split_keys, workers=8).check()


@pytest.mark.parametrize("element_type", ["bf16", "f16"])
@pytest.mark.parametrize("workers", [1, 8], ids=["whole", "split"])
def test_quantized_caches(element_type, workers):
    step = Case(MIXED, attention(dtype=element_type, quantized=True), split_keys=32, workers=workers)
    step.check()


def test_large_keys_are_cut_off_at_the_largest_of_the_cache():
    step = Case([(20, 2)], attention(quantized=True))
    step.key[0], step.value[1] = 1000.0, -1000.0
    step.check(roundings=2)


@pytest.mark.parametrize("element_type", ["bf16", "f16"])
def test_split_caches_are_merged(element_type):
    step = Case([(400, 1), (20, 1), (150, 40)], attention(dtype=element_type), split_keys=32, workers=6)
    assert step.check().merges.count > 0


def test_more_parts_than_a_merge_reads_at_once():
    step = Case([(2300, 1)], attention(num_heads=2, num_kv_heads=1), split_keys=32, workers=99)
    schedule = step.check()
    assert np.diff(schedule.merges.begin).max() > MERGE_PARTS


def test_a_token_group_decodes_together():
    step = Case([(60, 4), (30, 3)], attention(num_heads=4, num_kv_heads=1))
    schedule = step.check()
    assert schedule.items[:, Item.VARIANT].tolist() == [0, 0]


@pytest.mark.parametrize(
    "prefixes",
    [
        {1: (0, 4), 2: (0, 4), 3: (0, 4)},
        {1: (0, 4), 3: (2, 5)},
        {1: (0, 6), 2: (0, 2), 3: (2, 5)},
    ],
    ids=["one", "groups", "tree"],
)
@pytest.mark.parametrize("facts", [{}, {"quantized": True, "sinks": True, "dtype": "bf16"}], ids=["plain", "all"])
def test_shared_prefixes_are_read_once(prefixes, facts):
    requests = [(100, 1), (110, 1), (96, 1), (140, 3)]
    step = Case(requests, attention(**facts), prefixes=prefixes, sharing=ALWAYS_SHARED, split_keys=32, workers=3)
    schedule = step.check()
    assert schedule.keys_not_read > 0


def test_a_prefix_within_the_window_is_read_once():
    step = Case(
        [(100, 1), (104, 1), (97, 1)],
        attention(window=90),
        prefixes={1: (0, 5), 2: (0, 5)},
        sharing=ALWAYS_SHARED,
    )
    assert step.check().shared_requests == 3


def test_more_sharers_than_a_tile_has_rows():
    requests = [(64, 1)] * 40
    step = Case(requests, prefixes={i: (0, 4) for i in range(1, 40)}, sharing=ALWAYS_SHARED)
    assert step.check().shared_requests == 40


def test_tokens_that_belong_to_nobody_are_left_alone():
    Case(RAGGED, padding=3).check()


def test_keys_that_all_rows_see_go_without_masks():
    tall = variants(2, rows=64)
    step = Case([(200, 64), (31, 70)], variants=tall)
    names = {program.name: program.constants for program in programs(step.spec)}
    assert names["prefill"]["UNMASKED"] and not names["decode"]["UNMASKED"]
    step.check()


@pytest.mark.parametrize("element_type", ["bf16", "f16"])
def test_scores_far_apart_neither_overflow_nor_vanish(element_type):
    step = Case([(90, 1), (0, 40)], attention(dtype=element_type, scale=4.0))
    step.check(roundings=2)


@pytest.mark.parametrize(
    ("facts", "tiles", "reason"),
    [
        ({"dtype": "f32"}, {}, "queries of f32 have no kernel on a GPU"),
        ({"layout": "pair"}, {}, "layout is 'pair'"),
        ({}, {"row_tile": 24}, r"variants\[0\].row_tile is 24, and must be a power of two"),
        ({}, {"key_chunk": 8}, r"variants\[0\].key_chunk is 8"),
        ({}, {"max_tokens": 9}, "is 18, and must fit row_tile, 16"),
    ],
)
def test_what_has_no_program_is_refused(facts, tiles, reason):
    decode, prefill = variants(2)
    spec = KernelSpec(attention(**facts), "sm_90", (replace(decode, **tiles), prefill))
    with pytest.raises(KernelError, match=reason):
        programs(spec)


def test_a_kernel_of_cpu_variants_is_refused():
    with pytest.raises(KernelError, match="must be one at least"):
        programs(KernelSpec(attention(), "sm_90", ()))


@pytest.mark.parametrize("sharing", [None, ALWAYS_SHARED], ids=["plain", "shared"])
def test_a_captured_grid_serves_any_step(monkeypatch, sharing):
    monkeypatch.setattr(GpuAttentionRunner, "_is_captured", lambda self: True)
    requests = [(200, 1), (90, 1), (77, 1), (96, 1), (40, 1)]
    step = Case(requests, prefixes={2: (1, 4), 3: (1, 5)}, sharing=sharing, split_keys=32, workers=9)
    assert step.check().merges.count > 0


def test_a_step_that_shares_more_than_there_is_room_for_shares_nothing(monkeypatch):
    monkeypatch.setattr(gpu._Room, "holds", lambda self, packed, schedule: schedule.shared_requests == 0)
    step = Case([(64, 1)] * 4, prefixes={i: (0, 4) for i in range(1, 4)}, sharing=ALWAYS_SHARED)
    schedule = step.check()
    assert (schedule.shared_requests, schedule.without_room) == (0, True)


def test_a_step_beyond_the_limits_is_an_error():
    step = Case([(0, 3)] * 4)
    policy = StepPolicy(1, 1 << 20, 2)
    runner = GpuAttentionRunner(step.spec, policy, StepLimits(1, 1), torch.device("cpu"))
    many = np.arange(2001, dtype=np.int32)
    with pytest.raises(KernelError, match="2000 requests and 2000 tokens is larger"):
        runner.begin_step(Step(many, np.ones(2000, np.int32)))


def test_heads_that_lie_apart_are_refused():
    step = Case([(5, 1)])
    step.query = step.query.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="heads of a token side by side, not strides"):
        step.run()
