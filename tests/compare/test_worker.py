from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from llmir.compare import worker
from llmir.compare.frameworks import FRAMEWORKS, framework_named
from llmir.compare.job import Job
from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Continuation, QualityTask
from llmir.errors import LlmirError


class FakeEngine:
    """Notes what it is asked, in order."""

    def __init__(self, model: str, arguments: dict[str, Any]):
        self.asked: list[str] = []
        self.served: list[list[int]] = []

    def vocabulary(self) -> list[int]:
        return list(range(1000))

    def encode(self, text: str) -> list[int]:
        return list(range(10_000))

    def serve(self, requests):
        self.asked.append("serve")
        self.served += [request.prompt_token_ids for request in requests]
        return [RequestRecord(len(r.prompt_token_ids), 0.0, [1.0] * r.max_tokens, 0) for r in requests]

    def continue_greedily(self, prompts, output_tokens):
        self.asked.append("continue")
        return [Continuation([1] * output_tokens, [{1: -1.0}] * output_tokens, 0) for _ in prompts]

    def score(self, texts):
        self.asked.append("score")
        return [[-1.0] * (len(text) - 1) for text in texts]

    def forget_prefixes(self) -> None:
        self.asked.append("forget")

    def settings(self) -> dict[str, Any]:
        return {"block_size": 128}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    engine = FakeEngine("m", {})
    fake = replace(FRAMEWORKS["vllm"], load=lambda: lambda model, arguments: engine)
    monkeypatch.setitem(FRAMEWORKS, "vllm", fake)
    return engine


def job(runs: dict[str, int], quality: QualityTask | None = None) -> Job:
    return Job("vllm", "m", {}, runs, 0, quality, time.monotonic(), "unused")


def test_each_workload_runs_as_often_as_asked(engine: FakeEngine):
    result = worker.measure(job({"short": 2, "smoke": 1}), lambda line: None)
    assert {name: len(repeats) for name, repeats in result.runs.items()} == {"short": 2, "smoke": 1}


def test_something_is_served_before_anything_is_timed(engine: FakeEngine):
    worker.measure(job({"smoke": 1}), lambda line: None)
    assert engine.asked == ["serve", "serve"]


def test_no_two_prompts_share_a_beginning(engine: FakeEngine):
    worker.measure(job({"short": 3}), lambda line: None)
    firsts = [tuple(prompt[:8]) for prompt in engine.served]
    assert len(set(firsts)) == len(firsts)


def test_prompts_that_are_to_be_cached_are_served_before_and_in_every_timed_run(engine: FakeEngine):
    result = worker.measure(job({"extend": 2}), lambda line: None)
    assert engine.asked == ["serve"] * 4
    cached, *timed = (engine.served[start : start + 16] for start in (16, 32, 48))
    assert all(prompts == cached for prompts in timed)
    assert len(result.runs["extend"]) == 2


def test_the_cold_run_starts_from_an_empty_prefix_cache(engine: FakeEngine):
    worker.measure(job({}, QualityTask(2, 32, 4, 2, 64)), lambda line: None)
    assert engine.asked == ["serve", "forget", "continue", "continue", "score"]


def test_start_up_counts_from_the_start_of_the_process(engine: FakeEngine):
    before = Job("vllm", "m", {}, {}, 0, None, time.monotonic() - 5.0, "unused")
    assert worker.measure(before, lambda line: None).start_up.total_seconds >= 5.0


def test_an_unknown_framework_is_an_error():
    with pytest.raises(LlmirError, match="cannot compare 'tgi'"):
        framework_named("tgi")


def test_a_worker_does_not_outlive_its_parent():
    watch = "from llmir.compare.worker import _end_with_parent; _end_with_parent()"
    with subprocess.Popen([sys.executable, "-c", watch], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGKILL
