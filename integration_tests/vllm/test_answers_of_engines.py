"""Random models beyond the window, through layers that llmir does not know, and from a cached prefix: vLLM's answers.

Queries and keys are large enough that attention picks out few tokens: where a window ends shows.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, WriteModel

SCRIPT = Path(__file__).parent / "answers_of_engines.py"
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


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        *(("gemma2", {}), ("mixtral", {}), ("qwen3_moe", {}), ("opt", {}), ("bloom", {}), ("gpt_oss", {})),
        ("llama", {"head_dim": 112}),
    ],
    ids=lambda given: given if isinstance(given, str) else "".join(f"{name}={size}" for name, size in given.items()),
)
def test_answers_are_vllms(with_weights: WriteModel, tmp_path: Path, family: str, changes: dict[str, int]) -> None:
    model, asked = with_weights(family, **changes), prompts(FAMILIES[family]["vocab_size"])
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
