"""Real vLLM answering with llmir's kernels, in each of the ways vLLM starts its processes."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from servers import serving

PROMPT = "The capital of France is"
ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28, "max_model_len": 1024}
GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, prompt, backend, engine = sys.argv[1:]
    llm = LLM(model, attention_backend=backend, **json.loads(engine))
    answer = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4))[0].outputs[0].text
    print("ANSWER" + json.dumps(answer))
"""
START_SECONDS = 300


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """One cache folder for all ways to start: the second finds the plan and the kernels of the first."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    own = {"LLMIR_CACHE": str(tmp_path_factory.mktemp("cache")), "VLLM_CPU_OMP_THREADS_BIND": cores}
    return {**os.environ, **own, "VLLM_LOGGING_LEVEL": "INFO"}


def generate(model: str, backend: str, environment: dict[str, str], folder: Path) -> tuple[str, str]:
    """The answer to PROMPT, and everything that was printed."""
    script = folder / "generate.py"  # a file: vLLM's worker processes import the main module again
    script.write_text(GENERATE)
    done = subprocess.run(
        [sys.executable, str(script), model, PROMPT, backend, json.dumps(ENGINE)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=2 * START_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    answer = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))
    return json.loads(answer.removeprefix("ANSWER")), done.stdout


def server_command(model: str) -> list[str]:
    """An OpenAI server with llmir's flag."""
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in ENGINE.items() if value is not True]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return [*command, "--enforce-eager", "--attention-backend", "LLMIR", *arguments]


def test_in_process(smollm2: str, environment: dict[str, str], tmp_path: Path) -> None:
    answer, output = generate(smollm2, "LLMIR", {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, tmp_path)
    assert answer.startswith(" Paris")
    assert "serves 30 layers" in output


def test_with_engine_and_worker_processes(smollm2: str, environment: dict[str, str], tmp_path: Path) -> None:
    answer, output = generate(smollm2, "CUSTOM", environment, tmp_path)
    assert answer.startswith(" Paris")
    assert "serves 30 layers" in output


def test_under_the_openai_server(smollm2: str, environment: dict[str, str], tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    body = json.dumps({"model": smollm2, "prompt": PROMPT, "max_tokens": 4, "temperature": 0}).encode()
    with serving(server_command(smollm2), environment, log, START_SECONDS) as (address, _):
        request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)["choices"][0]["text"]
    assert answer.startswith(" Paris")
    assert "serves 30 layers" in log.read_text()
