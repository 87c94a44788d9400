"""Compiled kernels call nothing that their objects do not define: the loader would refuse them."""

from __future__ import annotations

import pytest
from attention_cases import RUNNABLE_ISAS, layout_of, spec_of

from llmir.ir.signature import HEAD_SIZES, AttentionSignature
from llmir.kernels.cpu.calibration import _compile
from llmir.kernels.cpu.loader import load_object


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("element_type", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("head_size", [min(HEAD_SIZES), max(HEAD_SIZES)])  # of large heads LLVM likes to call memset
@pytest.mark.parametrize("block_size", [1, 32])
def test_a_kernel_s_object_is_complete(isa, element_type, head_size, block_size):
    from llmir.kernels.cpu.lowering import compile_object

    layout = layout_of(element_type, isa, block_size)
    signature = AttentionSignature(6, 2, head_size, element_type, block_size, 0.125, 100, 30.0, layout)
    load_object(compile_object(spec_of(signature, isa)))


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
def test_the_measuring_kernels_object_is_complete(isa):
    load_object(_compile(isa))
