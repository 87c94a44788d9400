"""Plans kept on disk: read again, made again where they are of no use, made once by many."""

import logging
import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from test_plan import PLAN

from llmir.errors import LlmirError
from llmir.frontends.common import plan_cache
from llmir.frontends.common.options import Options
from llmir.frontends.common.plan_cache import plan_key, source_digest
from llmir.kernels import build_lock
from llmir.plan import Plan
from llmir.targets.machine import Target

logger = logging.getLogger("llmir.test")
FACTS = {"framework": "vllm 1", "model": "m", "world_size": 1}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def plan() -> Plan:
    return Plan.loads(PLAN.dumps())


def no_child() -> Plan:
    raise AssertionError("a plan was made")


def test_a_kept_plan_is_not_made_again(cache: Path, plan: Plan) -> None:
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    assert plan_cache.get_or_make("key", no_child, logger) == plan


@pytest.mark.parametrize("content", ["", '{"format": 1', '{"format": 99}', "\x00\x01"])
def test_a_spoilt_plan_is_made_again(cache: Path, plan: Plan, content: str, caplog: pytest.LogCaptureFixture) -> None:
    plan_cache.get_or_make("key", lambda: plan, logger)
    (cache / "plans" / "key.json").write_text(content)
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    assert "of no use" in caplog.text
    assert plan_cache.get_or_make("key", no_child, logger) == plan


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "file" / "below"))
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    assert "without the cache" in caplog.text


def test_a_full_disk_costs_a_warning(
    cache: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: Any, **folders: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    assert "No space left on device" in caplog.text
    assert [p.name for p in (cache / "plans").iterdir() if p.suffix != ".lock"] == []


def test_two_starts_at_once_make_one_plan(cache: Path, plan: Plan) -> None:
    made, found = [], []

    def make() -> Plan:
        made.append(1)
        return plan

    starts = [Thread(target=lambda: found.append(plan_cache.get_or_make("key", make, logger))) for _ in range(4)]
    for start in starts:
        start.start()
    for start in starts:
        start.join()
    assert (found, len(made)) == ([plan] * 4, 1)


def failed_start() -> pytest.ExceptionInfo[LlmirError]:
    """A failed start's error: whoever has it, has the frames and what is alive in them."""

    def fail() -> Plan:
        raise LlmirError("no such layer")

    with pytest.raises(LlmirError, match="no such layer") as caught:
        plan_cache.get_or_make("key", fail, logger)
    return caught


def test_a_second_start_is_told_the_same_error(cache: Path) -> None:
    first = failed_start()
    assert str(failed_start().value) == str(first.value)


def test_a_start_that_waits_for_a_failing_one_makes_the_plan(cache: Path, plan: Plan) -> None:
    found = []
    waiting = Thread(target=lambda: found.append(plan_cache.get_or_make("key", lambda: plan, logger)))

    def fail() -> Plan:
        waiting.start()
        raise LlmirError("no such layer")

    with pytest.raises(LlmirError, match="no such layer") as first:
        plan_cache.get_or_make("key", fail, logger)
    waiting.join(30)
    assert found == [plan], first


def test_a_plan_made_after_a_failed_start_is_kept(cache: Path, plan: Plan) -> None:
    first = failed_start()
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    assert plan_cache.get_or_make("key", no_child, logger) == plan, first


def _start(plan: str, answers: Any) -> None:
    answers.put(plan_cache.get_or_make("key", lambda: Plan.loads(plan), logger).dumps())


def test_another_process_makes_the_plan_after_a_failed_start(cache: Path, plan: Plan) -> None:
    first = failed_start()
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    child = fork.Process(target=_start, args=(plan.dumps(), answers))
    child.start()
    assert answers.get(timeout=30) == plan.dumps(), first
    child.join()


def test_an_error_without_a_cache_folder_is_told_without_the_folder_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "file" / "below"))
    assert failed_start().value.__context__ is None


def test_an_error_after_a_spoilt_plan_is_told_without_the_plan_s(cache: Path, plan: Plan) -> None:
    plan_cache.get_or_make("key", lambda: plan, logger)
    (cache / "plans" / "key.json").write_text("")
    assert failed_start().value.__context__ is None


def test_a_plan_that_asks_for_itself_is_an_error(cache: Path, plan: Plan) -> None:
    with pytest.raises(LlmirError, match="asks for its own result") as first:
        plan_cache.get_or_make("key", lambda: plan_cache.get_or_make("key", no_child, logger), logger)
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan, first


def test_a_plan_that_another_process_is_long_in_making_is_made_without_it(
    cache: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build_lock, "PATIENCE", 0.1)
    found = []
    other = Thread(target=lambda: found.append(plan_cache.get_or_make("key", lambda: plan, logger)))

    def make() -> Plan:
        other.start()
        other.join()
        return plan

    assert plan_cache.get_or_make("key", make, logger) == plan
    assert found == [plan]
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"waited 0 s for {cache / 'plans' / 'key.lock'}, which process {os.getpid()} on " in warning
    assert "without the cache" in warning


@pytest.mark.parametrize("spoil", ["folder", "plan"])
def test_a_plan_that_another_user_may_have_written_is_made_again(
    cache: Path, plan: Plan, spoil: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan_cache.get_or_make("key", lambda: replace(plan, model="another's"), logger)
    spoilt = cache / "plans" if spoil == "folder" else cache / "plans" / "key.json"
    spoilt.chmod(spoilt.stat().st_mode | 0o020)
    assert plan_cache.get_or_make("key", lambda: plan, logger) == plan
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"{spoilt} can be written by others" in warning
    assert "chmod -R go-w" in warning


# ---- its keys


def test_everything_that_decides_a_plan_is_in_its_key(tmp_path: Path) -> None:
    host = Target.named("cpu:avx512_bf16")
    workload = tmp_path / "workload.json"
    workload.write_text("[]")
    keys = [
        plan_key(FACTS, Options(), host),
        plan_key({**FACTS, "world_size": 2}, Options(), host),
        plan_key({**FACTS, "framework": "vllm 2"}, Options(), host),
        plan_key({**FACTS, "framework": "sglang 1"}, Options(), host),
        plan_key(FACTS, Options(workload="chat"), host),
        plan_key(FACTS, Options(workload=str(workload)), host),
        plan_key(FACTS, Options(prefix_sharing="off"), host),
        plan_key(FACTS, Options(), Target.named("cpu:avx2")),
        plan_key(FACTS, Options(), replace(host, cores=host.cores + 1)),
    ]
    workload.write_text("[ ]")
    keys.append(plan_key(FACTS, Options(workload=str(workload)), host))
    assert len(set(keys)) == len(keys)
    assert plan_key(FACTS, Options(), host) == plan_key(FACTS, Options(prefix_sharing="on"), host) == keys[0]


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("frontends/vllm/importer.py", True),
        ("frontends/sglang/importer.py", False),
        ("frontends/common/recording.py", True),
        ("frontends/__init__.py", True),
        ("targets/x86/tiles.py", True),
        ("compiler.py", True),
        ("cli/explain.py", False),
        ("compare/vllm_engine.py", False),
    ],
)
def test_only_source_that_a_plan_depends_on_counts(tmp_path: Path, path: str, counts: bool) -> None:
    before = source_digest("vllm", tmp_path)
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("# edited")
    assert (source_digest("vllm", tmp_path) != before) is counts
