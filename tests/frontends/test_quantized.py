"""How weights are stored, read from layers like the frameworks', of methods that not every machine builds too."""

import pytest
import torch
from torch import nn

from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.quantized import quantized
from llmir.ir.quant_scheme import QuantScheme

F8, I32, U8 = torch.float8_e4m3fn, torch.int32, torch.uint8
OUTPUTS, INPUTS, EXPERTS = 576, 1024, 8


def layer(**tensors):
    """A layer whose parameters have these shapes and dtypes."""
    made = nn.Module()
    for name, (shape, dtype) in tensors.items():
        data = torch.empty(shape, dtype=dtype, device="meta")
        made.register_parameter(name, nn.Parameter(data, requires_grad=False))
    return made


LINEARS = {
    "awq_marlin": (
        {
            "qweight": ((INPUTS, OUTPUTS // 8), I32),
            "qzeros": ((INPUTS // 128, OUTPUTS // 8), I32),
            "scales": ((INPUTS // 128, OUTPUTS), torch.float16),
        },
        QuantScheme("awq", "i4", (1, 128), "f16", "i4"),
    ),
    "auto_gptq": (
        {
            "qweight": ((INPUTS // 4, OUTPUTS), I32),
            "qzeros": ((1, OUTPUTS // 4), I32),
            "scales": ((1, OUTPUTS), torch.float16),
            "g_idx": ((INPUTS,), I32),
        },
        QuantScheme("gptq", "i8", (1, 0), "f16", "i8"),
    ),
    "compressed-tensors": (
        {
            "weight_packed": ((OUTPUTS, INPUTS // 8), I32),
            "weight_scale": ((OUTPUTS, INPUTS // 32), torch.bfloat16),
            "weight_shape": ((2,), torch.int64),
        },
        QuantScheme("compressed-tensors", "i4", (1, 32), "bf16"),
    ),
    "w8a8_int8": (
        {"weight": ((OUTPUTS, INPUTS), torch.int8), "weight_scale": ((OUTPUTS, 1), torch.float32)},
        QuantScheme("w8a8-int8", "i8", (1, 0), "f32"),
    ),
    "fp8": (
        {"weight": ((OUTPUTS, INPUTS), F8), "weight_scale_inv": ((5, 8), torch.float32)},
        QuantScheme("fp8", "f8E4M3FN", (128, 128), "f32"),
    ),
    "fp8 of merged layers": (
        {
            "weight": ((OUTPUTS, INPUTS), F8),
            "weight_scale": ((3,), torch.float32),
            "input_scale": ((3,), torch.float32),
        },
        QuantScheme("fp8 of merged layers", "f8E4M3FN", (0, 0), "f32"),
    ),
    "modelopt_fp4": (
        {"weight": ((OUTPUTS, INPUTS // 2), U8), "weight_scale": ((OUTPUTS, INPUTS // 16), F8)},
        QuantScheme("modelopt-fp4", "f4E2M1FN", (1, 16), "f8E4M3FN"),
    ),
}


@pytest.mark.parametrize("method", LINEARS)
def test_a_linear_layer_tells_its_scheme(method):
    tensors, scheme = LINEARS[method]
    found = quantized(layer(**tensors), (OUTPUTS, INPUTS), method)
    assert (found.scheme, found.shape) == (scheme, (OUTPUTS, INPUTS))


def test_mxfp4_experts_tell_their_scheme():
    tensors = {
        "w13_weight": ((EXPERTS, OUTPUTS, INPUTS // 2), U8),
        "w13_weight_scale": ((EXPERTS, OUTPUTS, INPUTS // 32), U8),
        "w13_bias": ((EXPERTS, OUTPUTS), torch.bfloat16),
        "w2_weight": ((EXPERTS, 1, 1), U8),
    }
    experts = layer(**tensors)
    found = quantized(experts, (EXPERTS, OUTPUTS, INPUTS), "mxfp4", prefix="w13_")
    assert found.scheme == QuantScheme("mxfp4", "f4E2M1FN", (1, 32), "f8E8M0FNU")
    assert found.numbers is experts.w13_weight
    assert found.scheme.stored_bytes(found.shape) == EXPERTS * OUTPUTS * (INPUTS // 2 + INPUTS // 32)


@pytest.mark.parametrize(
    ("tensors", "block"),
    [
        ({"w2_weight": ((EXPERTS, OUTPUTS, INPUTS), F8), "w2_weight_scale": ((EXPERTS,), torch.float32)}, (0, 0)),
        ({"w2_weight": ((EXPERTS, OUTPUTS, INPUTS), F8), "w2_weight_scale": ((EXPERTS, 2), torch.float32)}, (0, 0)),
        (
            {"w2_weight": ((EXPERTS, OUTPUTS, INPUTS), F8), "w2_weight_scale": ((EXPERTS, 576, 1), torch.float32)},
            (1, 0),
        ),
        (
            {"w2_weight": ((EXPERTS, OUTPUTS, INPUTS), F8), "w2_weight_scale_inv": ((EXPERTS, 5, 8), torch.float32)},
            (128, 128),
        ),
        (
            {"w2_qweight": ((EXPERTS, INPUTS // 8, OUTPUTS), I32), "w2_scales": ((EXPERTS, 8, 576), torch.float16)},
            (1, 128),
        ),
    ],
)
def test_experts_tell_what_shares_a_scale(tensors, block):
    found = quantized(layer(**tensors), (EXPERTS, OUTPUTS, INPUTS), "fp8", prefix="w2_")
    assert found.scheme.block == block


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "has no qweight or weight_packed or weight"),
        ({"weight": ((OUTPUTS, INPUTS), torch.int8)}, "has no scales"),
        (
            {"qweight": ((INPUTS * 3 // 32, OUTPUTS), I32), "scales": ((8, OUTPUTS), torch.float16)},
            "numbers .* are of type",
        ),
        ({"weight": ((OUTPUTS, 100), torch.int8), "weight_scale": ((OUTPUTS, 1), torch.float32)}, "do not fill"),
        ({"weight": ((OUTPUTS, INPUTS), torch.int8), "weight_scale": ((100,), torch.float32)}, "not for equal parts"),
        ({"weight": ((OUTPUTS, INPUTS), torch.int8), "weight_scale": ((1, 2, 3), torch.float32)}, "for no weight"),
        ({"weight": ((OUTPUTS, INPUTS), torch.int8), "weight_scale": ((OUTPUTS, 1), torch.int8)}, "scales .* of type"),
    ],
)
def test_what_is_stored_in_no_known_way_is_not_guessed(tensors, message):
    with pytest.raises(NotInDialectError, match=message):
        quantized(layer(**tensors), (OUTPUTS, INPUTS), "somebody's")


def test_a_weight_of_no_known_shape_is_not_guessed():
    made = layer(scales=((8, OUTPUTS), torch.float16))
    made.qweight = nn.UninitializedParameter(requires_grad=False, device="meta")
    with pytest.raises(NotInDialectError, match="has no qweight"):
        quantized(made, (OUTPUTS, INPUTS), "gguf")
