from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import ProgressEvent, order, run
from llmir.compare.process import SideFailedError
from llmir.errors import LlmirError

Options = Callable[..., CompareOptions]


def test_sides_alternate():
    sides = [side for _, side in order(3)]
    assert sides == ["baseline", "llmir", "llmir", "baseline", "baseline", "llmir"]


def test_every_run_is_a_process_of_its_own_and_one_of_each_side_is_asked_for_quality(
    options: Options, worker: Sequence[str], starts: Path
):
    run(options(), worker=worker)
    noted = [line.split() for line in starts.read_text().splitlines()]
    assert [side for side, *_ in noted] == [side for _, side in order(3)]
    assert [quality for _, quality, _ in noted] == ["True", "True", "False", "False", "False", "False"]
    assert len({binding for *_, binding in noted}) == 1


def test_rows_hold_medians_and_pairwise_ratios(options: Options, worker: Sequence[str]):
    rows = {row.metric: row for row in run(options(), worker=worker).rows}
    row = rows["time_per_output_token"]
    assert (row.framework, row.workload) == ("vllm", "smoke")
    assert (row.baseline, row.llmir, row.speedup) == (1.0, 0.5, 2.0)
    assert row.speedups == [2.0, 2.0, 2.0]
    assert rows["time_to_first_token"].speedup == 1.0
    assert rows["output_tokens_per_second"].speedup == pytest.approx(5 / 3)


def test_extra_start_up_time_is_reported(options: Options, worker: Sequence[str]):
    (start_up,) = run(options(), worker=worker).start_up
    assert (start_up.baseline, start_up.llmir, start_up.extra) == (3.0, 4.0, 1.0)


def test_the_json_report_has_the_agreed_keys(options: Options, worker: Sequence[str], tmp_path: Path):
    path = tmp_path / "results" / "report.json"
    run(options(json_path=path), worker=worker)
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
    assert {"machine", "versions", "variables", "preloads", "thread_binding", "settings"} <= report[
        "environment"
    ].keys()


def test_no_quality_unless_asked(options: Options, worker: Sequence[str]):
    assert run(options(quality=False), worker=worker).quality == []


def test_quality_can_be_asked_for_alone(options: Options, worker: Sequence[str]):
    comparison = run(options(workloads=()), worker=worker)
    assert comparison.rows == []
    assert comparison.quality[0].max_logprob_difference == pytest.approx(0.1)


def test_progress_counts_the_processes(options: Options, worker: Sequence[str]):
    events: list[ProgressEvent] = []
    run(options(pairs=1), events.append, worker=worker)
    assert events[-1].done == events[-1].total == 2
    assert "baseline, pair 1 of 1: ready after 0 s" in [event.text for event in events]


def failure(options: CompareOptions, worker: Sequence[str]) -> str:
    with pytest.raises(SideFailedError) as caught:
        run(options, worker=worker)
    message = str(caught.value)
    for kept in re.findall(r"its log is (\S+\.log)", message):
        Path(kept).unlink()  # raises if the message named a file that is not there
    return message


def test_a_failed_side_is_named_with_the_cause_and_the_tail_of_its_log(
    options: Options, worker: Sequence[str], tmp_path: Path
):
    path = tmp_path / "report.json"
    message = failure(
        options(llmir_engine={"attention_backend": "LLMIR", "behaviour": "raise"}, json_path=path), worker
    )
    first, second, *tail = message.splitlines()
    assert first == "the llmir side of the comparison ended with exit code 3: llmir cannot serve layer 'x'"
    assert second.startswith("its log is ")
    assert tail[-1].startswith("RuntimeError")
    assert not path.exists()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [("die", "was ended by SIGKILL, perhaps for lack of memory"), ("silent", "without a result")],
)
def test_a_side_that_vanishes_is_an_error(options: Options, worker: Sequence[str], behaviour: str, message: str):
    assert message in failure(options(engine={"behaviour": behaviour}), worker)


def test_a_validation_error_is_given_whole(options: Options, worker: Sequence[str]):
    first = failure(options(engine={"behaviour": "refuse"}), worker).splitlines()[0]
    assert first.endswith("pydantic.ValidationError: 1 validation error for ModelConfig Value error, too long")


def test_a_side_that_hangs_is_ended(options: Options, worker: Sequence[str]):
    assert "did not finish within 3 s" in failure(options(engine={"behaviour": "hang"}, timeout_seconds=3), worker)


def test_failures_are_errors_for_users():
    assert issubclass(SideFailedError, LlmirError)
