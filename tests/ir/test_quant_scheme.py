"""What a quantized weight takes in memory."""

import pytest

from llmir.ir.quant_scheme import QuantScheme

#: One of each kind that frameworks load, and bytes of a weight [1024, 4096] by hand: numbers, scales, zero points.
CASES = {
    "int8 a channel": (QuantScheme("compressed-tensors", "i8", (1, 0), "f32"), 4 << 20, 1024 * 4, 0),
    "int4 a group": (QuantScheme("compressed-tensors", "i4", (1, 128), "bf16"), 2 << 20, 1024 * 32 * 2, 0),
    "awq": (QuantScheme("awq", "i4", (1, 128), "f16", "i4"), 2 << 20, 1024 * 32 * 2, 1024 * 32 // 2),
    "gptq of 8 bits": (QuantScheme("gptq", "i8", (1, 0), "f16", "i8"), 4 << 20, 1024 * 2, 1024),
    "fp8 a tensor": (QuantScheme("fp8", "f8E4M3FN", (0, 0), "f32"), 4 << 20, 4, 0),
    "fp8 a block": (QuantScheme("fp8", "f8E4M3FN", (128, 128), "f32"), 4 << 20, 8 * 32 * 4, 0),
    "mxfp4": (QuantScheme("mxfp4", "f4E2M1FN", (1, 32), "f8E8M0FNU"), 2 << 20, 1024 * 128, 0),
}


@pytest.mark.parametrize(("scheme", "numbers", "scales", "zero_points"), CASES.values(), ids=list(CASES))
def test_bytes_are_of_numbers_scales_and_zero_points(scheme, numbers, scales, zero_points):
    assert scheme.problem() is None
    assert scheme.stored_bytes([1024, 4096]) == numbers + scales + zero_points
    assert scheme.stored_bytes([8, 1024, 4096]) == 8 * (numbers + scales + zero_points)


def test_a_block_at_an_edge_has_a_scale_too():
    assert QuantScheme("fp8", "f8E4M3FN", (128, 128), "f32").scales([576, 100]) == 5
