"""Models with layers that llmir does not know, of random weights: SGLang's answers with llmir's kernels are its own."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, WriteModel

SCRIPT = Path(__file__).parent / "answer_tokens.py"
#: Tokens of the prompts, which begin alike.
LENGTHS = (80, 100, 120)
#: Nats by which a float32 log-probability may differ.
NOISE = 2e-3
SECONDS = 600


def answers(model: str, backend: str, prompts: list[list[int]], folder: Path) -> list[dict[str, Any]]:
    output = folder / f"{backend}.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), model, backend, json.dumps(prompts), str(output)],
        env={**os.environ, "LLMIR_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return json.loads(output.read_text())


@pytest.mark.parametrize("family", ["mixtral"])
def test_answers_are_sglangs(with_weights: WriteModel, tmp_path: Path, family: str) -> None:
    model, drawn = with_weights(family), random.Random(0)
    tokens = [drawn.randrange(3, FAMILIES[family]["vocab_size"]) for _ in range(max(LENGTHS))]
    prompts = [tokens[:length] for length in LENGTHS]
    ours, theirs = (answers(model, backend, prompts, tmp_path) for backend in ("llmir", "torch_native"))
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["tokens"] == its["tokens"]
        assert max(abs(a - b) for a, b in zip(mine["logprobs"], its["logprobs"], strict=True)) < NOISE
