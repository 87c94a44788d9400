"""vLLM's attention layer with llmir's Triton kernels, emulated: answers as in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parent / "interpreted_steps.py"
#: A unit in the last place of float16.
MOST_ERROR = 2**-11


@pytest.mark.parametrize(
    ("features", "shares"),
    [({}, True), ({"sinks": True, "soft_cap": 20.0, "window": 24}, None), ({"quantized": True}, True)],
    ids=["plain", "sinks, soft cap, window", "fp8"],
)
def test_steps_through_vllms_layer_are_right(features: dict[str, Any], shares: bool | None) -> None:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(features)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ERRORS"))
    found = json.loads(line.removeprefix("ERRORS"))
    assert found["prompts"] < MOST_ERROR
    assert found["tokens"] < MOST_ERROR
    assert shares is None or (found["shared"] > 0) == shares
