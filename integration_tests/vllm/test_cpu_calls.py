"""What llmir's implementation of a layer on a CPU is called with, before a kernel gets its address."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmir.errors import UnsupportedLayerError
from llmir.frontends.vllm.backend import LlmirAttentionImpl, LlmirMetadata
from llmir.ir.attention_spec import AttentionSpec

HEADS, KV_HEADS, SIZE, BLOCK, TOKENS = 4, 2, 64, 32, 3
SIGNATURE = AttentionSpec.dense(HEADS, KV_HEADS, SIZE, "f16", BLOCK, 0.125)


@pytest.fixture
def layer() -> Any:
    """A layer with a runner that only counts its calls."""
    calls: list[tuple[Any, ...]] = []
    made = LlmirAttentionImpl(HEADS, SIZE, 0.125, KV_HEADS)
    made._layer = "layers.0"
    made._runner = SimpleNamespace(  # type: ignore[assignment]
        spec=SimpleNamespace(attention=SIGNATURE), calls=calls, attend=lambda *call, **of_heads: calls.append(call)
    )
    return made


def call(layer: Any, **changes: Any) -> None:
    given = {
        **{name: torch.ones(TOKENS, HEADS, SIZE, dtype=torch.float16) for name in ("query", "output")},
        **{name: torch.ones(TOKENS, KV_HEADS, SIZE, dtype=torch.float16) for name in ("key", "value")},
        "kv_cache": torch.zeros(4, KV_HEADS, BLOCK, 2 * SIZE, dtype=torch.float16),
        "attn_metadata": LlmirMetadata(TOKENS, torch.zeros(TOKENS, dtype=torch.int64)),
        **changes,
    }
    layer.forward(None, **given)


def test_what_the_kernel_reads_is_passed_on(layer: Any) -> None:
    call(layer)
    assert len(layer._runner.calls) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"query": torch.ones(TOKENS, HEADS, SIZE)}, "its query is .* in float32"),
        ({"key": torch.ones(TOKENS, KV_HEADS, SIZE, dtype=torch.bfloat16)}, "its key is .* in bfloat16"),
        ({"value": torch.ones(TOKENS - 1, KV_HEADS, SIZE, dtype=torch.float16)}, r"its value is \[2, 2, 64\]"),
        ({"key": None}, "it is called without a key"),
        ({"output": torch.ones(TOKENS, HEADS, SIZE)}, "its output is .* in float32"),
        ({"output_scale": torch.ones(1)}, "its output is to be quantized"),
        ({"kv_cache": torch.zeros(4, KV_HEADS, BLOCK, 2 * SIZE)}, "KV cache is .* in float32, not .* in float16"),
        ({"attn_metadata": LlmirMetadata(TOKENS, torch.zeros(2, dtype=torch.int64))}, "its slots are"),
    ],
)
def test_nothing_is_read_as_what_it_is_not(layer: Any, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedLayerError, match=f"'layers.0'.*{reason}"):
        call(layer, **changes)
    assert not layer._runner.calls
