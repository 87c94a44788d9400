"""A model through vLLM's own attention and through llmir's: the same answers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent / "answers_of_engines.py"
#: Nats by which a float32 log-probability may differ.
NOISE = 2e-3
SECONDS = 600
#: A tiny model needs one thread, and vLLM would bind those it starts to cores that others may be using.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def check_same_answers(
    model: str, prompts: list[list[int]], folder: Path, dtype: str = "float32", noise: float = NOISE
) -> list[dict[str, Any]]:
    """The answers with llmir's kernels, after the check that they are vLLM's own within ``noise`` nats.

    ``folder``: of the test. Each prompt is asked alone, one after the other, so that a later one may find its beginning
    in the cache.
    """
    jobs = [[model, backend, prompts, dtype] for backend in ("LLMIR", None)]
    output = folder / "answers.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(jobs), str(output)],
        env={**os.environ, **ONE_THREAD, "LLMIR_CACHE": str(folder / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    ours, theirs = json.loads(output.read_text())
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["tokens"] == its["tokens"]
        largest = max(abs(a - b) for a, b in zip(mine["logprobs"], its["logprobs"], strict=True))
        assert largest < noise
    return ours
