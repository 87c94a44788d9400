"""``llmir compare`` on the command line, up to where processes would start."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llmir import compare as package
from llmir.cli import app
from llmir.cli import compare as command
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ProgressEvent
from llmir.compare.quality import BRIEF_TASK, QualityTask
from llmir.compare.workloads import WORKLOADS
from llmir.errors import LlmirError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[CompareOptions]:
    """What would be run."""
    runs: list[CompareOptions] = []

    def note(options: Sequence[CompareOptions], files: object, progress: object, budget_seconds: float | None) -> None:
        runs.extend(options)

    monkeypatch.setattr(package, "run", note)
    monkeypatch.setattr(package, "print_report", lambda comparison: None)
    return runs


def invoke(*arguments: str) -> None:
    CliRunner().invoke(app, ["compare", *arguments], catch_exceptions=False)


def test_all_is_every_framework_with_its_own_workloads_and_pairs(asked: list[CompareOptions], model: Path):
    invoke("all", "--model", str(model))
    assert [(options.framework, options.workloads, options.pairs) for options in asked] == [
        ("vllm", None, None),
        ("sglang", None, None),
    ]


def test_what_is_asked_for_holds_for_every_framework(asked: list[CompareOptions], model: Path):
    invoke("all", "--model", str(model), "--workload", "short", "--workload", "extend", "--pairs", "5", "--no-quality")
    assert len(asked) == 2
    for options in asked:
        assert (tuple(options.runs()), options.pair_count(), options.quality) == (("short", "extend"), 5, False)


def test_the_dtype_is_the_same_for_every_framework(asked: list[CompareOptions], model: Path):
    invoke("all", "--model", str(model), "--dtype", "float32")
    assert [options.dtype for options in asked] == ["float32", "float32"]


def test_with_a_budget_fewer_answers_are_compared(asked: list[CompareOptions], model: Path):
    invoke("vllm", "--model", str(model))
    invoke("vllm", "--model", str(model), "--budget", "20")
    assert [options.quality_task for options in asked] == [QualityTask(), BRIEF_TASK]


def test_an_unknown_dtype_is_refused_with_those_there_are(asked: list[CompareOptions], model: Path):
    with pytest.raises(LlmirError, match="no dtype 'fp8'; choose from bfloat16, float16, float32"):
        invoke("vllm", "--model", str(model), "--dtype", "fp8")


@pytest.mark.parametrize(("given", "seconds"), [([], None), (["--budget", "1.5"], 90.0)])
def test_a_budget_is_in_minutes(monkeypatch: pytest.MonkeyPatch, model: Path, given: list[str], seconds: float | None):
    budgets: list[float | None] = []
    monkeypatch.setattr(package, "run", lambda *arguments, budget_seconds: budgets.append(budget_seconds))
    monkeypatch.setattr(package, "print_report", lambda comparison: None)
    invoke("vllm", "--model", str(model), *given)
    assert budgets == [seconds]


def test_an_unknown_framework_is_refused(asked: list[CompareOptions], model: Path):
    with pytest.raises(LlmirError, match="cannot compare 'tgi'; it compares vllm, sglang"):
        invoke("tgi", "--model", str(model))
    assert not asked


def test_a_generator_of_one_framework_is_refused_for_all_of_them(asked: list[CompareOptions], model: Path):
    with pytest.raises(LlmirError, match=r"workload prefix_repetition .* run it with: llmir compare vllm"):
        invoke("all", "--model", str(model), "--workload", "prefix_repetition")
    assert not asked


def test_the_help_names_every_workload():
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "500"}).output
    assert [name for name in WORKLOADS if name not in text] == []


def test_the_bar_is_drawn_on_events_alone(monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    monkeypatch.setattr(command, "progress", Console(file=output, force_terminal=True, width=80))
    threads = threading.active_count()
    with command._shown_progress() as show:
        show(ProgressEvent(1, 4, "vLLM: ready", "about 3 min left"))
        # A bar that redraws itself has a thread for it.
        assert threading.active_count() == threads
        assert "1/4" in output.getvalue()
        assert "vLLM: ready (about 3 min left)" in output.getvalue()


def test_elsewhere_each_event_is_a_line(monkeypatch: pytest.MonkeyPatch):
    output = io.StringIO()
    monkeypatch.setattr(command, "progress", Console(file=output, width=80))
    with command._shown_progress() as show:
        show(ProgressEvent(0, 4, "vLLM: starting"))
        show(ProgressEvent(1, 4, "vLLM: ready", "about 3 min left"))
    assert output.getvalue().splitlines() == ["0/4 vLLM: starting", "1/4 vLLM: ready (about 3 min left)"]
