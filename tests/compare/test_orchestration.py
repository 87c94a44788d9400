from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ProgressEvent, ReportFiles, run
from llmir.compare.process import SideFailedError
from llmir.compare.schedule import order
from llmir.errors import LlmirError

Options = Callable[..., CompareOptions]


def noted(starts: Path) -> list[dict]:
    """What the fake workers were asked, one after another."""
    return [json.loads(line) for line in starts.read_text().splitlines()]


def test_every_run_is_a_process_of_its_own_and_one_of_each_side_is_asked_for_quality(
    options: Options, worker: Sequence[str], starts: Path
):
    run([options()], worker=worker)
    assert [start["side"] for start in noted(starts)] == [side for _, side in order(3)]
    assert [start["quality"] for start in noted(starts)] == [True, True, False, False, False, False]
    assert len({start["threads"] for start in noted(starts)}) == 1
    assert not any(start["allotted"] for start in noted(starts))


def test_rows_hold_medians_and_pairwise_ratios(options: Options, worker: Sequence[str]):
    rows = {row.metric: row for row in run([options()], worker=worker).rows}
    row = rows["time_per_output_token"]
    assert (row.framework, row.workload) == ("vllm", "smoke")
    assert (row.baseline, row.llmir, row.speedup) == (1.0, 0.5, 2.0)
    assert row.speedups == [2.0, 2.0, 2.0]
    assert rows["time_to_first_token"].speedup == 1.0
    assert rows["output_tokens_per_second"].speedup == pytest.approx(5 / 3)


def test_a_first_start_stands_apart_from_the_later_ones(options: Options, worker: Sequence[str]):
    (start_up,) = run([options()], worker=worker).start_up
    assert (start_up.baseline_first, start_up.llmir_first) == (13.0, 14.0)
    assert (start_up.baseline_later, start_up.llmir_later) == (3.0, 4.0)


def test_a_single_pair_has_no_later_start(options: Options, worker: Sequence[str]):
    (start_up,) = run([options(pairs=1)], worker=worker).start_up
    assert (start_up.baseline_later, start_up.llmir_later) == (None, None)


def test_frameworks_run_one_after_the_other_into_one_report(options: Options, worker: Sequence[str]):
    events: list[ProgressEvent] = []
    both = [options(pairs=1), options(framework="sglang", workloads=("smoke", "extend"), pairs=2)]
    comparison = run(both, progress=events.append, worker=worker)
    assert [part.framework for part in comparison.quality] == ["vllm", "sglang"]
    assert [part.framework for part in comparison.start_up] == ["vllm", "sglang"]
    assert {(row.framework, row.workload) for row in comparison.rows} == {
        ("vllm", "smoke"),
        ("sglang", "smoke"),
        ("sglang", "extend"),
    }
    assert list(comparison.environment["frameworks"]) == ["vllm", "sglang"]
    assert events[-1].total == 6
    assert [event.done for event in events] == sorted(event.done for event in events)


def test_a_workload_has_no_row_for_a_metric_it_cannot_have(options: Options, worker: Sequence[str]):
    comparison = run([options(workloads=("extend",))], worker=worker)
    assert [row.metric for row in comparison.rows] == [
        "time_to_first_token",
        "output_tokens_per_second",
        "total_tokens_per_second",
    ]
    workloads = comparison.environment["frameworks"]["vllm"]["workloads"]
    assert workloads["extend"]["cached_tokens"] == {"baseline": 9, "llmir": 9}


def test_nothing_runs_unless_every_framework_is_installed(options: Options, starts: Path, monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LlmirError, match=r"sglang is not installed .* run: make \.venvs/sglang"):
        run([options(framework="sglang")])
    assert not starts.exists()


def test_the_json_report_has_the_agreed_keys(options: Options, worker: Sequence[str], tmp_path: Path):
    path = tmp_path / "results" / "report.json"
    run([options()], ReportFiles(json=path), worker=worker)
    report = json.loads(path.read_text())
    assert {"framework", "workload", "metric", "baseline", "llmir", "speedup"} <= report["rows"][0].keys()
    assert [row["metric"] for row in report["rows"]] == [
        "time_per_output_token",
        "time_to_first_token",
        "output_tokens_per_second",
        "total_tokens_per_second",
    ]
    assert {
        "framework",
        "greedy_agreement",
        "greedy_agreement_baseline_with_itself",
        "max_logprob_difference",
        "perplexity_baseline",
        "perplexity_llmir",
        "perplexity_relative_difference",
    } <= report["quality"][0].keys()
    assert {"machine", "commit", "model", "frameworks"} <= report["environment"].keys()
    conditions = report["environment"]["frameworks"]["vllm"]
    assert {"versions", "variables", "preloads", "settings", "workloads", "pairs", "dtype"} <= conditions.keys()
    assert conditions["settings"].keys() == {"baseline", "llmir"}


def test_no_quality_unless_asked(options: Options, worker: Sequence[str]):
    assert run([options(quality=False)], worker=worker).quality == []


def test_quality_can_be_asked_for_alone(options: Options, worker: Sequence[str]):
    comparison = run([options(workloads=())], worker=worker)
    assert comparison.rows == []
    assert comparison.quality[0].max_logprob_difference == pytest.approx(0.1)


def test_progress_counts_the_processes(options: Options, worker: Sequence[str]):
    events: list[ProgressEvent] = []
    run([options(pairs=1)], progress=events.append, worker=worker)
    assert events[-1].done == events[-1].total == 2
    assert "vLLM baseline, pair 1 of 1: ready after 0 s" in [event.text for event in events]


def test_progress_says_what_is_left_once_something_has_run(options: Options, worker: Sequence[str]):
    events: list[ProgressEvent] = []
    run([options(pairs=2)], progress=events.append, worker=worker)
    told = {event.text: event.left for event in events}
    assert told["vLLM baseline, pair 1 of 2: starting"] == ""
    assert told["vLLM llmir, pair 2 of 2: smoke done"] == "less than a minute left"


def test_with_a_budget_every_framework_runs_its_first_pair_and_no_further_one_that_does_not_fit(
    options: Options, worker: Sequence[str], starts: Path
):
    events: list[ProgressEvent] = []
    both = [options(pairs=3), options(framework="sglang", workloads=("smoke", "extend"), pairs=2)]
    comparison = run(both, progress=events.append, worker=worker, budget_seconds=0)
    assert [(start["framework"], start["side"]) for start in noted(starts)] == [
        ("vllm", "baseline"),
        ("vllm", "llmir"),
        ("sglang", "baseline"),
        ("sglang", "llmir"),
    ]
    frameworks = comparison.environment["frameworks"]
    assert [(part["pairs"], part["pairs_asked_for"]) for part in frameworks.values()] == [(1, 3), (1, 2)]
    assert all(part["budget_seconds"] == 0 for part in frameworks.values())
    assert events[-1].done == events[-1].total == 4


def test_what_the_first_process_leaves_out_for_the_budget_is_left_out_by_all(
    options: Options, worker: Sequence[str], starts: Path
):
    comparison = run([options(workloads=("smoke", "extend"))], worker=worker, budget_seconds=0)
    assert [start["workloads"] for start in noted(starts)] == [["smoke", "extend"], ["smoke"]]
    assert {row.workload for row in comparison.rows} == {"smoke"}
    conditions = comparison.environment["frameworks"]["vllm"]
    assert conditions["left_out_for_the_budget"] == ["extend"]
    assert list(conditions["workloads"]) == ["smoke"]


def test_a_budget_that_is_enough_changes_only_the_order(options: Options, worker: Sequence[str], starts: Path):
    both = [options(pairs=2), options(framework="sglang", workloads=("smoke", "extend"), pairs=2)]
    run(both, worker=worker, budget_seconds=1e6)
    assert [start["framework"] for start in noted(starts)[::2]] == ["vllm", "sglang", "vllm", "sglang"]
    assert noted(starts)[2]["workloads"] == ["smoke", "extend"]


def failure(options: CompareOptions, worker: Sequence[str], files: ReportFiles | None = None) -> str:
    with pytest.raises(SideFailedError) as caught:
        run([options], files, worker=worker)
    message = str(caught.value)
    for kept in re.findall(r"its log is (\S+\.log)", message):
        Path(kept).unlink()  # raises if the message named a file that is not there
    return message


def test_a_failed_side_is_named_with_the_cause_and_where_its_log_is(
    options: Options, worker: Sequence[str], tmp_path: Path
):
    path = tmp_path / "report.json"
    message = failure(
        options(llmir_engine={"attention_backend": "LLMIR", "behaviour": "raise"}), worker, ReportFiles(json=path)
    )
    first, second = message.splitlines()
    assert first == "the llmir side of the vLLM comparison ended with exit code 3: llmir cannot serve layer 'x'"
    assert second.startswith("its log is ")
    assert not path.exists()


def test_what_follows_a_cause_in_its_line_stays_in_the_log(options: Options, worker: Sequence[str]):
    first, _ = failure(options(engine={"behaviour": "one line"}), worker).splitlines()
    assert first.endswith("exit code 3: RuntimeError: no room for the cache")
    first, _ = failure(options(engine={"behaviour": "long"}), worker).splitlines()
    assert first.endswith("word word ...") and len(first) < 500


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("die", "was ended by SIGKILL, perhaps for lack of memory"), ("silent", "without a result")],
)
def test_a_side_that_vanishes_is_an_error(options: Options, worker: Sequence[str], behaviour: str, message: str):
    assert message in failure(options(engine={"behaviour": behaviour}), worker)


def test_a_process_killed_for_its_childs_failure_is_reported_with_the_childs_error(
    options: Options, worker: Sequence[str]
):
    made = options(framework="sglang", engine={"behaviour": "child"})
    assert failure(made, worker).splitlines()[0] == (
        "the baseline side of the SGLang comparison was ended by SIGKILL: NotImplementedError: there is no such kernel"
    )


def test_a_validation_error_is_given_whole(options: Options, worker: Sequence[str]):
    first = failure(options(engine={"behaviour": "refuse"}), worker).splitlines()[0]
    assert first.endswith("pydantic.ValidationError: 1 validation error for ModelConfig Value error, too long")


def test_a_side_that_hangs_is_ended(options: Options, worker: Sequence[str]):
    assert "did not finish within 3 s" in failure(options(engine={"behaviour": "hang"}, timeout_seconds=3), worker)


def test_failures_are_errors_for_users():
    assert issubclass(SideFailedError, LlmirError)
