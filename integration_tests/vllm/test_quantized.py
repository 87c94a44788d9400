"""Quantized checkpoints, as tools write them: imported, and where vLLM multiplies by such weights here, served.

Quantized weights change nothing about attention, so the answers are vLLM's own.
"""

import random
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import compress, to_awq
from same_answers import check_same_answers
from tiny_models import FAMILIES, LAYERS, WriteModel

from llmir.frontends.vllm.offline import import_model
from llmir.ir.attention import PagedAttention
from llmir.ir.module import ops_of
from llmir.ir.opaque import import_level

LENGTH, MORE = 150, 60
#: Nats by which log-probabilities may differ where attention's results are rounded to one of 255 steps, or to bfloat16:
#: float32 sums in another order may be rounded the other way, and a step is 1/127 of a token's largest element.
INT8_NOISE, BFLOAT16_NOISE = 0.03, 0.1
#: What multiplies by 4-bit weights in vLLM on a CPU: its kernels for AVX2 alone lack it.
FOUR_BITS = "cpu_gemm_wna16"


def prompts() -> list[list[int]]:
    drawn = random.Random(0)
    tokens = [drawn.randrange(3, FAMILIES["llama"]["vocab_size"]) for _ in range(LENGTH + MORE)]
    return [tokens[:LENGTH], tokens]


@pytest.mark.parametrize("scheme", ["W8A8", "W4A16", "FP8_DYNAMIC", "awq"])
def test_no_weights_are_refused(with_weights: WriteModel, scheme: str) -> None:
    model = with_weights("llama")
    to_awq(model) if scheme == "awq" else compress(model, scheme)
    module = import_model(model, skip_tokenizer_init=True, max_model_len=256)
    assert len(ops_of(module, PagedAttention)) == LAYERS
    assert import_level(module) != "attention", "the data flow around quantized layers is known"


def test_int8_weights_and_activations(with_weights: WriteModel, tmp_path: Path) -> None:
    model = with_weights("llama")
    compress(model, "W8A8")
    ours = check_same_answers(model, prompts(), tmp_path, noise=INT8_NOISE)
    assert ours[1]["cached"] > 0


def test_awq(with_weights: WriteModel, tmp_path: Path) -> None:
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    if not hasattr(torch.ops._C, FOUR_BITS):
        pytest.skip(f"vLLM has no {FOUR_BITS} for this processor, so it cannot serve 4-bit weights itself")
    model = with_weights("llama")
    to_awq(model)
    check_same_answers(model, prompts(), tmp_path, dtype="bfloat16", noise=BFLOAT16_NOISE)
