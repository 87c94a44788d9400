"""SGLang's server with llmir's flag: it answers, streams, outlives clients that leave, and refuses in one sentence."""

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import serving

START_SECONDS = 400
PROMPT = "The capital of France is"
LLMIR = ("--attention-backend", "llmir")


def command_of(model: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--device", "cpu", *arguments]


def launch(model: str, log: Path, *arguments: str, **environment: str) -> subprocess.Popen[bytes]:
    """SGLang's launcher where it is to end by itself, in a session of its own, so that what it leaves can be told."""
    with log.open("w") as output:
        return subprocess.Popen(
            command_of(model, *arguments),
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=log.parent,
        )


def session_is_empty(session: int, patience: float = 20) -> bool:
    """Whether every process of a session has ended, or does so soon."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        members = [int(line.split()[0]) for line in _processes() if int(line.split()[1]) == session]
        if not members:
            return True
        time.sleep(0.2)
    return False


def _processes() -> list[str]:
    """Number and session of every process that is not a mere entry in the table."""
    listed = subprocess.run(["ps", "-eo", "pid=,sid=,stat="], stdout=subprocess.PIPE, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if not line.split()[2].startswith("Z")]


def request(address: str, body: dict[str, Any]) -> urllib.request.Request:
    return urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})


def post(address: str, body: dict[str, Any]) -> dict[str, Any]:
    with urllib.request.urlopen(request(address, body), timeout=START_SECONDS) as response:
        return json.load(response)


class TestServing:
    @pytest.fixture(scope="class")
    def server(self, smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        """The address of a server that has never seen the model before.

        In float32: of what the model may say first, two are a tenth of a nat apart, which rounding to bfloat16 decides.
        """
        folder = tmp_path_factory.mktemp("server")
        command = command_of(smollm2, *LLMIR, "--dtype", "float32", "--max-total-tokens", "8192")
        environment = {**os.environ, "LLMIR_CACHE": str(folder / "cache")}
        with serving(command, environment, folder / "server.log", START_SECONDS) as (address, session):
            yield address
        assert session_is_empty(session), "processes are left"

    def test_it_generates(self, server: str) -> None:
        body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        assert post(f"{server}/generate", body)["text"].startswith(" Paris")

    def test_it_chats(self, server: str) -> None:
        body = {
            "messages": [{"role": "user", "content": "What is the capital of France?"}],
            "max_tokens": 16,
            "temperature": 0,
        }
        answer = post(f"{server}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        assert "Paris" in answer

    def test_it_streams(self, server: str) -> None:
        body = {"prompt": PROMPT, "model": "m", "max_tokens": 8, "temperature": 0, "stream": True}
        with urllib.request.urlopen(request(f"{server}/v1/completions", body), timeout=START_SECONDS) as response:
            lines = [line.decode().strip() for line in response if line.startswith(b"data: {")]
        pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines]
        assert len(pieces) > 2
        assert "".join(pieces).startswith(" Paris")

    def test_it_outlives_a_client_that_leaves(self, server: str) -> None:
        body = {"text": PROMPT, "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True}, "stream": True}
        with urllib.request.urlopen(request(f"{server}/generate", body), timeout=START_SECONDS) as response:
            response.readline()
        self.test_it_generates(server)

    def test_it_says_what_it_serves_with(self, server: str) -> None:
        with urllib.request.urlopen(f"{server}/get_server_info", timeout=60) as response:
            info = json.load(response)
        assert info["attention_backend"] == "llmir"
        assert info["page_size"] >= 16


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ((*LLMIR, "--page-size", "0"), 1, "page size 0 is not a number of tokens; give a --page-size of 1 or more"),
        ((*LLMIR, "--kv-cache-dtype", "fp8_e4m3"), 1, "KV cache dtype is 'fp8_e4m3'.*leave out --attention-backend"),
    ],
)
def test_a_refusal_is_the_last_line_and_leaves_no_process(
    smollm2: str, tmp_path: Path, arguments: tuple[str, ...], status: int, sentence: str
) -> None:
    log = tmp_path / "log"
    process = launch(smollm2, log, *arguments)
    assert process.wait(START_SECONDS) == status
    text = log.read_text()
    assert re.match(f"error: .*{sentence}", text.strip().splitlines()[-1])
    assert "Traceback" not in text
    assert session_is_empty(process.pid)


def test_an_engine_raises_the_refusal_and_leaves_no_process(smollm2: str, tmp_path: Path) -> None:
    script = (
        "import sys, sglang\n"
        "try:\n"
        "    asked = dict(attention_backend='llmir', kv_cache_dtype='fp8_e4m3')\n"
        "    sglang.Engine(model_path=sys.argv[1], device='cpu', **asked)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, smollm2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=tmp_path,
    )
    output = process.communicate(timeout=START_SECONDS)[0]
    assert "UnsupportedFeatureError llmir cannot serve this: the KV cache dtype is 'fp8_e4m3'" in output
    assert process.returncode == 0
    assert session_is_empty(process.pid)


def test_hidden_by_sglangs_variable_the_name_is_unknown_and_check_says_why(smollm2: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = launch(smollm2, log, *LLMIR, SGLANG_PLUGINS="other")
    assert process.wait(START_SECONDS) == 2
    assert "invalid choice: 'llmir'" in log.read_text()
    check = subprocess.run(
        [sys.executable, "-m", "llmir.cli", "check"],
        env={**os.environ, "SGLANG_PLUGINS": "other", "LLMIR_CACHE": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert check.returncode == 1
    assert "hidden by SGLANG_PLUGINS='other'" in check.stdout
    assert "add llmir to SGLANG_PLUGINS, or unset it" in check.stdout


def test_compile_reads_the_model_with_what_is_installed(smollm2: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmir.cli", "compile", smollm2, "--emit", "llm"],
        env={**os.environ, "LLMIR_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    from llmir.ir import dialect, text

    assert text.print_module(text.parse(done.stdout, dialect.context())).count("llm.fused_attention") == 30
