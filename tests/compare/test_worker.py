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
from llmir.compare.job import Job, announced_step, steps
from llmir.compare.measuring import Pace, RequestRecord
from llmir.compare.quality import Continuation, QualityTask
from llmir.compare.workloads import GeneratedPrefixes, Request, workload_named
from llmir.errors import LlmirError


class FakeEngine:
    """Notes what it is asked, in order."""

    def __init__(self, model: str, arguments: dict[str, Any]):
        self.asked: list[str] = []
        self.served: list[list[int]] = []
        self.generated: list[tuple[GeneratedPrefixes, int]] = []

    def vocabulary(self) -> list[int]:
        return list(range(1000))

    def encode(self, text: str) -> list[int]:
        return list(range(10_000))

    def generate_requests(self, shape, seed):
        self.generated.append((shape, seed))
        return [Request([seed, 7, 8], 2)]

    def serve(self, requests):
        self.asked.append("serve")
        self.served += [request.prompt_token_ids for request in requests]
        return [
            RequestRecord(len(r.prompt_token_ids), 0.0, [1.0] * r.max_tokens, 0, [-1 - i] * r.max_tokens)
            for i, r in enumerate(requests)
        ]

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
    return Job("vllm", "m", {}, runs, 0, True, None, quality, time.monotonic(), "unused")


def test_each_workload_runs_as_often_as_asked(engine: FakeEngine):
    result = worker.measure(job({"short": 2, "smoke": 1}), lambda line: None)
    assert {name: len(repeats) for name, repeats in result.runs.items()} == {"short": 2, "smoke": 1}


def test_a_workload_that_would_end_too_late_is_left_out_but_never_the_first_nor_the_answers(engine: FakeEngine):
    asked = replace(job({"short": 1, "chat": 1, "smoke": 1}, QualityTask(2, 32, 4, 2, 64)), allotted=0.0)
    result = worker.measure(asked, lambda line: None)
    assert list(result.runs) == ["short"]
    assert result.answers is not None
    asked = replace(asked, allotted=1e9)
    assert list(worker.measure(asked, lambda line: None).runs) == ["short", "chat", "smoke"]


def test_a_workload_fits_if_the_answers_after_it_do_too(monkeypatch: pytest.MonkeyPatch):
    asked = Job("vllm", "m", {}, {}, 0, True, 100.0, None, 0.0, "unused")
    monkeypatch.setattr(worker.time, "monotonic", lambda: 40.0)
    pace = Pace(prompt=0.01, output=0.02)
    assert worker._fits(asked, 60.0, pace)
    assert not worker._fits(asked, 60.1, pace)
    # 800 prompt tokens and 200 to generate: 12 s.
    with_quality = replace(asked, quality=QualityTask(10, 30, 10, 10, 50))
    assert worker._fits(with_quality, 48.0, pace)
    assert not worker._fits(with_quality, 48.1, pace)


def test_every_step_is_announced_in_order(engine: FakeEngine):
    lines: list[str] = []
    worker.measure(job({"smoke": 1, "short": 1}, QualityTask(2, 32, 4, 2, 64)), lines.append)
    assert [announced_step(line) for line in lines] == steps(["smoke", "short"], with_quality=True)


def test_what_is_served_before_can_be_left_to_the_first_run(engine: FakeEngine):
    worker.measure(replace(job({"smoke": 1}), warm_up=False), lambda line: None)
    assert engine.asked == ["serve"]


def test_something_is_served_before_anything_is_timed(engine: FakeEngine):
    worker.measure(job({"smoke": 1}), lambda line: None)
    assert engine.asked == ["serve", "serve"]


def test_no_two_prompts_share_a_beginning(engine: FakeEngine):
    worker.measure(job({"short": 3}), lambda line: None)
    firsts = [tuple(prompt[:8]) for prompt in engine.served]
    assert len(set(firsts)) == len(firsts)


def test_prompts_that_are_to_be_cached_are_served_before_every_timed_run(engine: FakeEngine):
    result = worker.measure(job({"extend": 2}), lambda line: None)
    assert engine.asked == ["serve"] * 5
    first, first_timed, second, second_timed = (engine.served[start : start + 16] for start in (16, 32, 48, 64))
    assert first == first_timed
    assert second == second_timed
    assert first != second
    assert len(result.runs["extend"]) == 2


def test_a_shared_prefix_is_served_before_the_timed_run_and_own_tokens_are_not(engine: FakeEngine):
    result = worker.measure(job({"shared-prefix": 1}), lambda line: None)
    prefix, *timed = engine.served[16:]
    assert len(prefix) == 6144
    assert all(prompt[:6144] == prefix and len(prompt) == 6144 + 128 for prompt in timed)
    assert [len(records) for records in result.runs["shared-prefix"]] == [16]


def test_a_later_turn_of_a_conversation_holds_the_answers_to_the_earlier_ones(engine: FakeEngine):
    (records,) = worker.measure(job({"multi-turn": 1}), lambda line: None).runs["multi-turn"]
    first, second, third = (engine.served[start : start + 16] for start in (17, 33, 49))
    for number, (one, two, three) in enumerate(zip(first, second, third, strict=True)):
        answer = [-1 - number] * 32
        assert two[: len(one) + 32] == one + answer
        assert three[: len(two) + 32] == two + answer
        assert (len(two), len(three)) == (len(one) + 32 + 128, len(two) + 32 + 128)
    assert [record.turn for record in records] == [0] * 16 + [1] * 16 + [2] * 16


def test_a_frameworks_own_generator_makes_new_requests_for_each_run_of_a_seed(engine: FakeEngine):
    worker.measure(job({"prefix_repetition": 2}), lambda line: None)
    assert engine.generated == [(workload_named("prefix_repetition").build, seed) for seed in (0, 1)]
    assert engine.served[16:] == [[0, 7, 8], [1, 7, 8]]


def test_the_cold_run_starts_from_an_empty_prefix_cache(engine: FakeEngine):
    worker.measure(job({}, QualityTask(2, 32, 4, 2, 64)), lambda line: None)
    assert engine.asked == ["serve", "forget", "continue", "continue", "score"]


def test_start_up_counts_from_the_start_of_the_process(engine: FakeEngine):
    before = Job("vllm", "m", {}, {}, 0, True, None, None, time.monotonic() - 5.0, "unused")
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
