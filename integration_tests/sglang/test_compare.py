"""The comparison around real SGLang: SGLang against itself, so that both sides must agree."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from self_comparison import check_every_metric, check_same_answers
from tiny_models import SMOLLM2

from llmir.compare import CompareOptions, Comparison, ReportFiles, run
from llmir.compare.process import SideFailedError
from llmir.compare.quality import QualityTask

#: Small enough for a test.
TASK = QualityTask(prompts=4, prompt_tokens=96, output_tokens=8, windows=2, window_tokens=128)


def options(**fields: Any) -> CompareOptions:
    defaults = {
        "workloads": ("smoke",),
        "pairs": 1,
        "dtype": "float32",
        "llmir_engine": {"attention_backend": "torch_native"},
    }
    return CompareOptions(model=str(SMOLLM2), framework="sglang", quality_task=TASK, **{**defaults, **fields})


def test_every_metric_is_measured(report: tuple[Comparison, Path]):
    check_every_metric(report[0])


def test_sglang_gives_itself_the_same_answers(report: tuple[Comparison, Path]):
    check_same_answers(report[0])


def test_the_model_knows_english(report: tuple[Comparison, Path]):
    # An even guess over the vocabulary would be 49152.
    assert 1.0 < report[0].quality[0].perplexity_baseline < 100.0


def test_the_second_greedy_run_reads_the_prefix_cache(report: tuple[Comparison, Path]):
    # With pages of one token all but the last token of a prompt.
    assert report[0].quality[0].cached_tokens == TASK.prompt_tokens - 1


def test_the_settings_of_both_sides_are_recorded(report: tuple[Comparison, Path]):
    conditions = json.loads(report[1].read_text())["environment"]["frameworks"]["sglang"]
    settings = conditions["settings"]["baseline"]
    assert settings == conditions["settings"]["llmir"]
    assert (settings["attention_backend"], settings["dtype"]) == ("torch_native", "float32")
    assert settings["threads"] == int(conditions["variables"]["OMP_NUM_THREADS"])
    assert conditions["versions"]["sglang"]


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        # The scheduler's process fails, and SGLang kills the process that started it.
        ("triton", "active drivers"),
        # The arguments are refused before there is a scheduler.
        ("no_such_backend", "no_such_backend"),
    ],
)
def test_what_sglang_refuses_is_reported_with_its_reason(backend: str, reason: str, tmp_path: Path):
    path = tmp_path / "report.json"
    with pytest.raises(SideFailedError, match="baseline side of the SGLang comparison") as caught:
        run([options(engine={"attention_backend": backend})], ReportFiles(json=path))
    (kept,) = re.findall(r"its log is (\S+\.log)", str(caught.value))
    Path(kept).unlink()
    assert reason in str(caught.value).splitlines()[0]
    assert not path.exists()
