"""Gemma 3 270M, a real model with windows and a norm of queries and keys: vLLM's perplexity with llmir's kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from same_answers import SECONDS

SCRIPT = Path(__file__).parent / "perplexity_of_engines.py"
MODEL = Path(__file__).parents[2] / "models" / "gemma3-270m"


@pytest.mark.skipif(not MODEL.exists(), reason="run `make gemma3` first")
def test_perplexity_is_vllms(tmp_path: Path) -> None:
    output = tmp_path / "perplexities.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(MODEL), json.dumps(["LLMIR", None]), str(output)],
        env={**os.environ, "LLMIR_CACHE": str(tmp_path / "cache"), "VLLM_LOGGING_LEVEL": "INFO"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("serves 3 layers") == 6, "vLLM gives layers of equal windows to groups of three"
    ours, theirs = json.loads(output.read_text())
    assert ours == pytest.approx(theirs, rel=1e-3)
