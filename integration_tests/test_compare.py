"""The comparison around real vLLM: vLLM against itself, so that both sides must agree."""

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

#: Small enough for a test, long enough for the cached run to find a whole block of 128 tokens.
TASK = QualityTask(prompts=4, prompt_tokens=160, output_tokens=8, windows=2, window_tokens=128)


def options(**fields: Any) -> CompareOptions:
    return CompareOptions(
        model=str(SMOLLM2),
        workloads=("smoke",),
        pairs=1,
        dtype="float32",  # no processor serves it slowly
        kv_cache_bytes=1 << 28,
        quality_task=TASK,
        **{"engine": {"enforce_eager": True, "max_num_seqs": 16}, "llmir_engine": {}, **fields},
    )


def test_every_metric_is_measured(report: tuple[Comparison, Path]):
    check_every_metric(report[0])


def test_vllm_gives_itself_the_same_answers(report: tuple[Comparison, Path]):
    check_same_answers(report[0])


def test_the_model_knows_english(report: tuple[Comparison, Path]):
    # An even guess over the vocabulary would be 49152.
    assert 1.0 < report[0].quality[0].perplexity_baseline < 100.0


def test_the_second_greedy_run_reads_the_prefix_cache(report: tuple[Comparison, Path]):
    assert report[0].quality[0].cached_tokens == 128


def test_the_settings_of_both_sides_are_recorded(report: tuple[Comparison, Path]):
    settings = json.loads(report[1].read_text())["environment"]["frameworks"]["vllm"]["settings"]
    assert settings["baseline"] == settings["llmir"]
    assert settings["baseline"]["kv_cache_memory_bytes"] == 1 << 28
    assert settings["baseline"]["enable_prefix_caching"] is True


def test_what_vllm_refuses_is_reported_with_its_reason(tmp_path: Path):
    path = tmp_path / "report.json"
    with pytest.raises(SideFailedError, match="baseline side of the vLLM comparison ended with exit code 1") as caught:
        run([options(engine={"max_model_len": 1 << 30})], ReportFiles(json=path))
    (kept,) = re.findall(r"its log is (\S+\.log)", str(caught.value))
    Path(kept).unlink()
    assert "max_model_len" in str(caught.value).splitlines()[0]
    assert not path.exists()
