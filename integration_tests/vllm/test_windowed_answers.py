"""A soft-capped model of windowed and other layers, beyond the window and from a cached prefix: vLLM's own answers.

Random weights, with queries and keys large enough that attention picks out few tokens: where a window ends shows.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, WriteModel
from transformers import AutoConfig, AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "windowed_answers.py"
WINDOW = FAMILIES["gemma2"]["sliding_window"]
#: A prompt of more than two windows, and how many tokens it goes on with the second time: of a window's cache vLLM
#: keeps the end.
LENGTH, MORE = 2 * WINDOW + 45, 60
#: Nats by which a float32 log-probability may differ.
NOISE = 2e-3
SECONDS = 600


def prompts(vocabulary: int) -> list[list[int]]:
    drawn = random.Random(0)
    tokens = [drawn.randrange(3, vocabulary) for _ in range(LENGTH + MORE)]
    return [tokens[:LENGTH], tokens]


@pytest.fixture
def with_weights(write_model: WriteModel) -> WriteModel:
    def write(family: str, **changes: Any) -> str:
        folder = write_model(family, torch_dtype="float32", **changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 8
            elif weight.dim() > 1:
                weight.data *= 3
        model.save_pretrained(folder)
        return folder

    return write


def test_answers_beyond_a_window_are_vllms(with_weights: WriteModel, tmp_path: Path) -> None:
    model, asked = with_weights("gemma2"), prompts(FAMILIES["gemma2"]["vocab_size"])
    jobs = [[model, backend, asked] for backend in ("LLMIR", None)]
    output = tmp_path / "answers.json"
    environment = {**os.environ, "LLMIR_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(jobs), str(output)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    ours, theirs = json.loads(output.read_text())
    assert ours[1]["cached"] >= WINDOW
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["tokens"] == its["tokens"]
        assert max(abs(a - b) for a, b in zip(mine["logprobs"], its["logprobs"], strict=True)) < NOISE
