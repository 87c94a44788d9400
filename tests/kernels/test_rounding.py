"""Rounding float32 to bfloat16, by an instruction or by integer arithmetic, is what the reference says."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from attention_cases import RUNNABLE_ISAS
from hypothesis import given
from hypothesis import strategies as st

from llmir.ir.bindings import ir
from llmir.kernels import reference
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.loader import load_object
from llmir.kernels.cpu.lowering import object_code
from llmir.kernels.cpu.products import Products
from llmir.targets.registry import lanes_of
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: Ties to even and odd, numbers that round into the next power of two or to infinity, both zeros, NaNs whose payload
#: would carry into the sign or vanish.
SPECIAL = [
    *(0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x3FFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF),
    *(0x7F800000, 0xFF800000, 0x00000000, 0x80000000, 0x00800000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF),
]
_LEAST_NORMAL = 0x00800000


@pytest.fixture(scope="module", params=RUNNABLE_ISAS)
def rounded(request):
    """What a kernel makes of float32 values, as bits; values are padded to whole vectors."""
    isa, lanes = request.param, lanes_of(request.param)
    products = Products("bf16", isa)

    def body(source: ir.Value, target: ir.Value) -> None:
        b.store(products.round(b.load(source, products.f32_vector(), alignment=4)), target, alignment=2)

    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        b.function(module, isa, "round", [b.pointer(), b.pointer()], body)
        function = load_object(object_code(module, "round")).function("round", [ctypes.c_void_p] * 2)

    def run(bits: list[int]) -> tuple[np.ndarray, np.ndarray]:
        if INSTRUCTION_SETS[isa].multiplies_pairs:  # its instruction takes denormal numbers for zero
            bits = [x for x in bits if (x & 0x7FFFFFFF) == 0 or (x & 0x7FFFFFFF) >= _LEAST_NORMAL]
        values = np.array(bits + [0] * (-len(bits) % lanes), np.uint32).view(np.float32)
        result = np.empty(len(values), np.uint16)
        for at in range(0, len(values), lanes):
            function(values[at:].ctypes.data, result[at:].ctypes.data)
        return result, reference.bf16_bits(values)

    return run


def test_ties_overflow_and_nan(rounded):
    result, expected = rounded(SPECIAL)
    assert [f"{x:04x}" for x in result] == [f"{x:04x}" for x in expected]


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_bits(rounded, bits):
    result, expected = rounded(bits)
    assert np.array_equal(result, expected)
