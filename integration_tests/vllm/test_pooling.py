"""An embedding model on a causal decoder: vLLM's vectors with llmir's kernels."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from same_answers import ONE_THREAD, SECONDS
from tiny_models import FAMILIES, WriteModel

SCRIPT = Path(__file__).parent / "embeddings_of_engines.py"
#: Tokens of the prompts: one of a step, one of two chunks.
LENGTHS = (5, 150)
#: By which the elements of a vector of length one may differ.
NOISE = 1e-5


def test_vectors_are_vllms(with_weights: WriteModel, smollm2: str, tmp_path: Path) -> None:
    model, drawn, output = with_weights("llama"), random.Random(0), tmp_path / "vectors.json"
    prompts = [[drawn.randrange(3, FAMILIES["llama"]["vocab_size"]) for _ in range(length)] for length in LENGTHS]
    engines = json.dumps([["LLMIR", prompts], [None, prompts]])
    done = subprocess.run(
        [sys.executable, str(SCRIPT), model, smollm2, engines, str(output)],
        env={**os.environ, **ONE_THREAD, "LLMIR_CACHE": str(tmp_path / "cache"), "VLLM_LOGGING_LEVEL": "INFO"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "serves 2 layers" in done.stdout
    for ours, theirs in zip(*json.loads(output.read_text()), strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < NOISE
