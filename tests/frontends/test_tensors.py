"""What a layer is called with, and what its kernel would read that as."""

from typing import Any

import pytest
import torch

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.tensors import LayerTensors
from llmir.ir.attention_spec import AttentionSpec

HEADS, KV_HEADS, SIZE, TOKENS = 4, 2, 64, 3
CPU = torch.device("cpu")


def layer(element_type: str = "f16") -> LayerTensors:
    return LayerTensors("layers.0", AttentionSpec.dense(HEADS, KV_HEADS, SIZE, element_type, 16, 0.125), CPU)


def rows(heads: int = HEADS, tokens: int = TOKENS, **facts: Any) -> torch.Tensor:
    return torch.ones(tokens, heads, SIZE, **{"dtype": torch.float16, **facts})


def test_what_the_kernel_takes_passes() -> None:
    layer().check(rows(), rows(tokens=TOKENS + 1), TOKENS)
    layer().check_new(rows(KV_HEADS), rows(KV_HEADS), torch.zeros(TOKENS, dtype=torch.int64), TOKENS)


@pytest.mark.parametrize(
    ("wrong", "found"),
    [
        (rows(dtype=torch.float32), r"\[3, 4, 64\] in float32 on cpu, and its kernel reads 3 tokens of \[4, 64\] in f"),
        (rows(dtype=torch.bfloat16), "in bfloat16 on cpu"),
        (rows(KV_HEADS), r"\[3, 2, 64\] in float16"),
        (rows(tokens=2), r"\[2, 4, 64\] in float16"),
        (rows().view(TOKENS, -1), r"\[3, 256\] in float16"),
        (rows(device="meta"), "on meta, and .* on cpu"),
    ],
)
def test_nothing_is_read_as_what_it_is_not(wrong: torch.Tensor, found: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"'layers.0': its query is .*{found}"):
        layer().check(wrong, rows(), TOKENS)
    with pytest.raises(UnsupportedLayerError, match=f"its output is .*{found}"):
        layer().check(rows(), wrong, TOKENS)


@pytest.mark.parametrize("name", ["key", "value"])
def test_new_keys_and_values_are_as_the_cache(name: str) -> None:
    slots = torch.zeros(TOKENS, dtype=torch.int64)
    for wrong in (rows(KV_HEADS, dtype=torch.float32), rows(KV_HEADS, tokens=2), rows()):
        given = {"key": rows(KV_HEADS), "value": rows(KV_HEADS), name: wrong}
        with pytest.raises(UnsupportedLayerError, match=f"its {name} is"):
            layer().check_new(given["key"], given["value"], slots, TOKENS)


@pytest.mark.parametrize("slots", [torch.zeros(TOKENS, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)])
def test_slots_are_whole_addresses_one_for_each_token(slots: torch.Tensor) -> None:
    with pytest.raises(UnsupportedLayerError, match="its slots are"):
        layer().check_new(rows(KV_HEADS), rows(KV_HEADS), slots, TOKENS)


def test_what_fits_is_not_copied() -> None:
    projection = torch.randn(TOKENS, 8 * SIZE, dtype=torch.float16)
    query = projection[:, : HEADS * SIZE]
    converted = layer().converted(query)
    assert converted.shape == (TOKENS, HEADS, SIZE)
    assert converted.data_ptr() == query.data_ptr()


def test_other_types_and_orders_are_converted() -> None:
    query = torch.randn(HEADS, TOKENS, SIZE).transpose(0, 1)
    converted = layer().converted(query)
    assert converted.dtype == torch.float16
    assert converted.is_contiguous()
    assert torch.equal(converted, query.half())
