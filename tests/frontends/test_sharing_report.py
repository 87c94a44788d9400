"""What a user reads of prefix sharing: log lines, and counters in this process or gathered from several."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_plan import PLAN, made_for

from llmir import compiler
from llmir.frontends.common import sharing_report
from llmir.frontends.common.options import Options
from llmir.frontends.common.planning import compile_module, plan_for
from llmir.frontends.common.sharing_report import SharingReport, what_is_shared
from llmir.ir.kernel_spec import SharingCosts
from llmir.plan import Plan, PlannedKernel
from llmir.runtime.layers import SharingCount
from llmir.targets.machine import Target

logger = logging.getLogger("llmir.test")
COSTS = SharingCosts(
    most_rows=32,
    least_tokens=512,
    read_key=9.0,
    cached_key=((512, 6.0),),
    tile_key=5.0,
    decode_rows=1000,
    decode_row_key=1.0,
    row=90.0,
    margin=0.9,
)


def kernel(layers: str, costs: SharingCosts | None) -> PlannedKernel:
    """A kernel that serves layers of these letters."""
    [one] = PLAN.kernels
    return replace(one, layers=tuple(layers), policy=replace(one.policy, sharing=costs))


# ---- at the start


def test_a_plan_says_from_how_many_tokens_prefixes_are_shared() -> None:
    kernels = kernel("ab", None), kernel("c", COSTS), kernel("de", replace(COSTS, least_tokens=256))
    said = what_is_shared(replace(PLAN, kernels=kernels))
    assert "on: 3 of 5 layers" in said
    assert "from 256 tokens on" in said
    assert what_is_shared(replace(PLAN, kernels=kernels[:1])).startswith("prefix sharing is off")


@pytest.mark.parametrize(("said", "served"), [("", COSTS), ("on", COSTS), ("off", None)])
def test_off_holds_for_a_plan_that_was_made_with_sharing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, said: str, served: SharingCosts | None
) -> None:
    file, here = tmp_path / "plan.json", made_for(Target.detect())
    replace(here, kernels=(replace(here.kernels[0], policy=kernel("ab", COSTS).policy),)).write(file)
    facts = {"framework": "vllm 0.32.0", "model": "tiny", "world_size": 1}

    def make() -> Plan:
        raise AssertionError("a plan was made")

    with caplog.at_level(logging.INFO):
        plan = plan_for(facts, Options(plan=str(file), prefix_sharing=said), make, logger)
    assert [kernel.policy.sharing for kernel in plan.kernels] == [served]
    assert f"prefix sharing is {said or 'on'}" in caplog.text


@pytest.mark.parametrize(("said", "asked"), [("", True), ("off", False)])
def test_the_compiler_is_told(monkeypatch: pytest.MonkeyPatch, said: str, asked: bool) -> None:
    told = []
    monkeypatch.setattr(compiler, "compile", lambda *_, prefix_sharing: told.append(prefix_sharing))
    compile_module(None, Options(prefix_sharing=said), logger)  # type: ignore[arg-type]
    assert told == [asked]


# ---- while serving


def share(count: SharingCount, requests: int, kv_bytes: int) -> None:
    """One step in which so much was shared."""
    count.steps += 1
    count.requests += requests
    count.kv_bytes += kv_bytes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its one element."""
    now = [100.0]
    monkeypatch.setattr(sharing_report.time, "monotonic", lambda: now[0])
    return now


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "prefixes were read once" in record.getMessage()]


def test_lines_come_at_intervals_while_something_is_shared(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    count = SharingCount()
    report = SharingReport(count, first_rank=True, logger=logger)
    with caplog.at_level(logging.INFO):
        report.update()
        assert lines(caplog) == []
        share(count, 4, 10**9)
        report.update()
        share(count, 8, 10**9)
        report.update()
        assert len(lines(caplog)) == 1
        clock[0] += sharing_report.LOG_INTERVAL
        report.update()  # shared nothing
        assert len(lines(caplog)) == 1
        share(count, 6, 10**9)
        report.update()
    first, second = lines(caplog)
    assert "in 1 steps" in first
    assert "for 4.0 requests a step" in first
    assert "in 2 steps" in second
    assert "for 7.0 requests a step" in second
    assert "2.000 GB, 3.000 GB since the start" in second


def test_the_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    count = SharingCount()
    with caplog.at_level(logging.INFO):
        share(count, 4, 10**9)
        SharingReport(count, first_rank=False, logger=logger).update()
    assert lines(caplog) == []


def test_counters_follow_exactly() -> None:
    registry = pytest.importorskip("prometheus_client").REGISTRY
    names = ("llmir_shared_prefix_requests_total", "llmir_shared_prefix_kv_bytes_not_read_total")
    first, other = SharingCount(), SharingCount()
    reports = [SharingReport(first, True, logger), SharingReport(other, False, logger)]
    before = [registry.get_sample_value(name) for name in names]
    for _ in range(3):
        share(first, 4, 1000)
        share(other, 4, 500)
        for report in reports:
            report.update()
            report.update()
    after = [registry.get_sample_value(name) for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [12, 4500]


def test_steps_that_cannot_share_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = pytest.importorskip("prometheus_client").REGISTRY
    name = "llmir_shared_prefix_blind_steps_total"
    first, other = SharingReport(SharingCount(), True, logger), SharingReport(SharingCount(), False, logger)
    before = registry.get_sample_value(name)
    for report in (first, other, first, other):
        report.blind("there is no table")
    assert registry.get_sample_value(name) - before == 2
    assert [record.getMessage() for record in caplog.records] == [
        "llmir: requests read their prefixes by themselves: there is no table"
    ]


def test_steps_without_room_to_share_are_counted_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    registry = pytest.importorskip("prometheus_client").REGISTRY
    name = "llmir_shared_prefix_blind_steps_total"
    count = SharingCount()
    report = SharingReport(count, first_rank=True, logger=logger)
    before = registry.get_sample_value(name)
    for _ in range(2):
        count.steps_without_room += 1
        report.update()
        report.update()
    assert registry.get_sample_value(name) - before == 2
    (record,) = caplog.records
    assert "more parts than the GPU's buffers have room for" in record.getMessage()


RANK = """
import logging, sys
from llmir.frontends.common.sharing_report import SharingReport
from llmir.runtime.layers import SharingCount
count = SharingCount()
report = SharingReport(count, sys.argv[1] == "0", logging.getLogger())
count.steps, count.requests, count.kv_bytes = 1, 4, 1000
report.update()
"""


def run_rank(rank: int, folder: Path) -> str:
    """What a process says that shared something and keeps its counters in ``folder``."""
    pytest.importorskip("prometheus_client")
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", RANK, str(rank)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=True).stderr


def test_an_endpoint_adds_up_the_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        run_rank(rank, tmp_path)
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(tmp_path))
    assert registry.get_sample_value("llmir_shared_prefix_requests_total") == 4
    assert registry.get_sample_value("llmir_shared_prefix_kv_bytes_not_read_total") == 2000


def test_a_folder_that_is_not_there_costs_a_warning(tmp_path: Path) -> None:
    assert "prefix sharing is not in the metrics" in run_rank(0, tmp_path / "none")
