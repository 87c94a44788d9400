"""The zoo serves a model on both sides, with different attention, and tells a refusal from an answer."""

import json
import os
import subprocess
import sys
from pathlib import Path

TOOLS = Path(__file__).parents[2] / "tools"
SECONDS = 600
#: Its windows end within the zoo's prompts.
WINDOWED = "Gemma3ForCausalLM"


def test_rows(tmp_path: Path) -> None:
    output = tmp_path / "zoo.json"
    command = [sys.executable, str(TOOLS / "zoo.py"), "vllm", "--json", str(output)]
    done = subprocess.run(
        [*command, "--only", WINDOWED, "BloomForCausalLM"],
        env={**os.environ, "LLMIR_CACHE": str(tmp_path / "cache")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    refused, windowed = json.loads(output.read_text())
    assert refused["outcome"] == "refused" and "ALiBi" in refused["words"]
    assert windowed["outcome"] == "same" and windowed["level"] == "full", windowed["words"]
    assert windowed["difference"] > 0, "both sides computed with the same attention"
