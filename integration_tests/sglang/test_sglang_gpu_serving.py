"""Steps of SGLang through the backend for GPUs with its real Triton programs, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

#: Relative error of float16 outputs, whose softmax weights are rounded too: two units in the last place.
MOST_ERROR = 2**-10


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    """What ``gpu_serving.py`` says: the interpreter is chosen when Triton is imported, so in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_serving.py"))]
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folders}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


FEATURES = ["plain", "quantized", "sinks"]


@pytest.mark.parametrize("feature", FEATURES)
def test_answers_are_the_definitions(answers: dict[str, Any], feature: str) -> None:
    assert answers[feature]["error"] < MOST_ERROR, answers


@pytest.mark.parametrize("feature", FEATURES)
def test_a_prefix_is_read_once_from_the_second_decode_step_on(answers: dict[str, Any], feature: str) -> None:
    # Two prompts, two steps, more of a prompt, a step: before the second step the host knows of nobody who shares.
    assert answers[feature]["shared"] == [0, 0, 0, 2, 0, 2]
