"""What the generators make of 16 lanes, without AVX512: the same operations, two narrower vectors each.

Not covered are the instructions that only AVX512 has: powers of two by one instruction, dot products of pairs.
"""

from __future__ import annotations

import pytest
import torch  # noqa: F401 - brings the OpenMP runtime
from attention_cases import HEAD_SIZES, SHARED, WIDE, Batch, check, emulate_wide, layout_of, spec_of

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import StepPolicy

POLICY = StepPolicy(decode_tokens=1, split_keys=32, items_per_thread=100, sharing=SHARED)
BATCH = Batch(
    cached=(100, 0, 63, 7, 300, 310),
    new=(1, 70, 1, 33, 1, 2),
    threads=2,
    prefixes=((0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (4, 256)),
)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    emulate_wide(monkeypatch)


@pytest.mark.parametrize("element_type", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("head_size", "value_size"), HEAD_SIZES)
@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_a_mixed_batch_with_shared_prefixes(element_type, head_size, value_size, block_size):
    layout = layout_of(element_type, WIDE, block_size)
    sizes = (6, 2, head_size, element_type, block_size, head_size**-0.5)
    check(spec_of(AttentionSpec.dense(*sizes, layout=layout, value_size=value_size), WIDE), BATCH, POLICY)


@pytest.mark.parametrize("element_type", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("more", [{"sinks": True}, {"alibi": True, "window": 77}])
def test_sinks_and_alibi(element_type, more):
    attention = AttentionSpec.dense(6, 2, 64, element_type, 32, 0.125, layout=layout_of(element_type, WIDE, 32), **more)
    check(spec_of(attention, WIDE), BATCH, POLICY)
