"""A plan's kernels in the hands of a backend."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from specs import changed
from test_plan import PLAN, SPEC

from llmir.errors import PlanError, UnsupportedLayerError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import SharingCosts
from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.cpu.object_cache import ObjectCache
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.layers import PlannedLayers, SharingCount, heads
from llmir.runtime.step import Step

FOUND = AttentionSpec.dense(9, 3, 64, "bf16", 128, scale=0.125)


@pytest.fixture
def loaded(monkeypatch):
    """Kernels that do nothing; the list has the spec of each one loaded."""
    specs = []

    def load(spec, cache):
        specs.append(spec)
        return Kernel(spec, lambda address: None, {})

    monkeypatch.setattr(Kernel, "load", load)
    return specs


def load(folder):
    return partial(CpuAttentionRunner.load, object_cache=ObjectCache(folder))


@pytest.fixture
def layers(loaded, tmp_path):
    return PlannedLayers(PLAN, load(tmp_path))


def test_layers_of_one_kernel_share_it(layers, loaded):
    assert layers.bind("layers.0", FOUND) is layers.bind("layers.1", FOUND)
    assert loaded == [SPEC]
    assert layers.kernels == {SPEC.symbol: 2}


def test_a_step_begins_for_every_kernel(layers, monkeypatch):
    begun = []
    begin_step = CpuAttentionRunner.begin_step
    monkeypatch.setattr(
        CpuAttentionRunner, "begin_step", lambda self, *given: begun.append(given) or begin_step(self, *given)
    )
    layers.bind("layers.0", FOUND)
    step = Step(np.array([0, 1], np.int32), np.array([5], np.int32), np.zeros((1, 2), np.int32))
    layers.begin_step(step, 2)
    assert begun == [(step, 2)]
    assert layers.sharing == SharingCount()


def test_what_sharing_saves_is_counted_for_every_layer(loaded, tmp_path):
    costs = SharingCosts(
        3,
        128,
        read_key=2.0,
        cached_key=((1, 2.0),),
        tile_key=1.0,
        decode_rows=1000,
        decode_row_key=1.0,
        row=1.0,
        margin=1.0,
    )
    (kernel,) = PLAN.kernels
    policy = replace(kernel.policy, sharing=costs)
    layers = PlannedLayers(replace(PLAN, kernels=(replace(kernel, policy=policy),)), load(tmp_path))
    layers.bind("layers.0", FOUND)
    layers.bind("layers.1", FOUND)
    lengths, table = np.array([300, 200, 290], np.int32), np.array([[5, 6, 1], [5, 7, 0], [5, 6, 2]], np.int32)
    for _ in range(2):
        layers.begin_step(Step(np.arange(4, dtype=np.int32), lengths, table), 1)
    read_again = 2 * 128 + 128  # the first block by two, the second by one
    assert layers.sharing == SharingCount(2, 2 * 3, 2 * 2 * read_again * 3 * 64 * 2 * 2)


def test_a_step_without_room_to_share_is_counted(layers, monkeypatch):
    begin_step = CpuAttentionRunner.begin_step
    monkeypatch.setattr(
        CpuAttentionRunner, "begin_step", lambda self, *given: replace(begin_step(self, *given), without_room=True)
    )
    layers.bind("layers.0", FOUND)
    layers.begin_step(Step(np.array([0, 1], np.int32), np.array([5], np.int32), np.zeros((1, 2), np.int32)), 2)
    assert layers.sharing == SharingCount(steps_without_room=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_heads": 8}, "it has num_heads 8, and the plan was made for num_heads 9"),
        ({"num_kv_heads": 1}, "num_kv_heads 1, .* for cache.num_kv_heads 3"),
        ({"head_size": 128}, "key_size 128, cache.value_size 128, .* for cache.key_size 64, cache.value_size 64"),
        ({"window": 32}, "mask.window 32, .* for mask.window 0"),
        ({"soft_cap": 30.0}, r"score_stages \(SoftCap\(cap=30.0\),\), .* for score_stages \(\)"),
        ({"block_size": 16}, "cache.block_size 16, .* for cache.block_size 128"),
        ({"dtype": "f16"}, "it has dtype f16, cache.dtype f16, and the plan was made for dtype bf16, cache.dtype bf16"),
        ({"scale": 0.25}, "scale 0.25, .* for scale 0.125"),
    ],
)
def test_a_layer_unlike_the_plans_is_refused(layers, loaded, change, reason):
    with pytest.raises(UnsupportedLayerError, match=f"{reason}.*; compile a new plan") as refusal:
        layers.bind("layers.1", changed(FOUND, **change))
    assert refusal.value.layer == "layers.1"
    assert loaded == []


def test_a_scale_may_be_rounded_otherwise(layers):
    layers.bind("layers.0", replace(FOUND, scale=float(np.float32(0.125) * (1 + 1e-7))))


def test_a_layer_that_the_plan_does_not_have_is_refused(layers):
    with pytest.raises(PlanError, match=r"no kernel for layer 'layers\.2'"):
        layers.bind("layers.2", FOUND)


class Tensor:
    """A float32 array with the methods of a torch tensor."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def stride(self):
        return tuple(s // 4 for s in self.array.strides)

    def data_ptr(self):
        return self.array.ctypes.data


def test_heads_of_a_part_of_a_projection():
    qkv = np.zeros((7, 15, 64), np.float32)
    assert heads(Tensor(qkv[:, 9:12]), 64) == (qkv.ctypes.data + 9 * 64 * 4, 15 * 64)


def test_heads_apart_are_refused():
    with pytest.raises(ValueError, match="side by side"):
        heads(Tensor(np.zeros((7, 15, 64), np.float32)[:, ::2]), 64)
