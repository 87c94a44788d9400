"""Windowed and soft-capped models, beyond their window and from a cached prefix: the answers of vLLM's own backend.

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
WINDOW = FAMILIES["mistral"]["sliding_window"]
#: Two prompts, each more than two windows long, that begin alike for more than one.
LENGTH, COMMON = 2 * WINDOW + 45, WINDOW + 70
#: Nats by which a float32 log-probability may differ.
NOISE = 2e-3
SECONDS = 600


def prompts(vocabulary: int) -> list[list[int]]:
    drawn = random.Random(0)
    one, two = ([drawn.randrange(3, vocabulary) for _ in range(LENGTH)] for _ in range(2))
    return [one, one[:COMMON] + two[COMMON:]]


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
    models = [with_weights("mistral"), with_weights("gemma2")]
    asked = prompts(FAMILIES["mistral"]["vocab_size"])
    jobs = [[model, backend, asked] for model in models for backend in ("LLMIR", None)]
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
    answers = json.loads(output.read_text())
    for ours, theirs in zip(answers[::2], answers[1::2], strict=True):
        assert ours[1]["cached"] >= WINDOW
        for mine, its in zip(ours, theirs, strict=True):
            assert mine["tokens"] == its["tokens"]
            assert max(abs(a - b) for a, b in zip(mine["logprobs"], its["logprobs"], strict=True)) < NOISE
