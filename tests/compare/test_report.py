from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from llmir.compare.chart import draw_chart
from llmir.compare.comparison import Comparison
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import run
from llmir.compare.report import print_report
from llmir.errors import LlmirError

SIDES = ("vLLM", "vLLM with llmir")


@pytest.fixture
def comparison(options: Callable[..., CompareOptions], worker: Sequence[str]) -> Comparison:
    return run([options(pairs=2)], worker=worker)


@pytest.fixture
def both(options: Callable[..., CompareOptions], worker: Sequence[str]) -> Comparison:
    """vLLM and SGLang, and a workload that only SGLang is asked for."""
    return run([options(pairs=1), options(framework="sglang", workloads=("smoke", "extend"), pairs=1)], worker=worker)


def printed(comparison: Comparison) -> str:
    console = Console(record=True, width=100)
    print_report(comparison, console)
    return console.export_text()


def test_the_table_shows_both_sides_and_the_speedup(comparison: Comparison):
    lines = printed(comparison).splitlines()
    assert lines[0].startswith("smoke: 2 requests")
    own, ours = (next(i for i, line in enumerate(lines) if line.startswith(f" {side}  ")) for side in SIDES)
    assert "1.00 s" in lines[own]
    assert "500.0 ms" in lines[ours]
    assert "2.00x (2.00-2.00)" in lines[ours + 1]


def test_each_workload_has_a_table_with_two_lines_a_framework(both: Comparison):
    sides = [line.strip().split("  ")[0] for line in printed(both).splitlines() if line.endswith(" /s ")]
    assert sides == [*SIDES, "SGLang", "SGLang with llmir", "SGLang", "SGLang with llmir"]


def test_a_metric_that_a_workload_cannot_have_has_no_column(both: Comparison):
    text = printed(both)
    extend = text[text.index("extend: ") : text.index("The same answers?")]
    assert "time to first token" in extend
    assert "time per output token" not in extend


@pytest.mark.parametrize(
    "text",
    [
        "perplexity",
        "same greedy text",
        "vLLM start-up: first 13.0 s, with llmir 14.0 s; later 3.0 s, with llmir 4.0 s",
        "vLLM: own attention, bfloat16, block size 128, threads on CPUs 2, own products; with llmir: own",
        "vLLM: dtype bfloat16, as asked for",
        "vLLM: pairs 2; preloaded",
    ],
)
def test_quality_start_up_and_settings_are_shown(comparison: Comparison, text: str):
    assert text in printed(comparison)


@pytest.mark.parametrize(
    ("difference", "text"),
    [
        (4e-6, " 0.0004%"),
        (1.23e-5, " 0.0012%"),
        (4.9e-4, " 0.049%"),
        (0.10517, " 10.517%"),
        (0.0, " 0.000%"),
        (3e-8, "below 0.0001%"),
    ],
)
def test_the_perplexitys_difference_has_digits_enough_for_float32(comparison: Comparison, difference: float, text: str):
    quality = replace(
        comparison.quality[0],
        perplexity_baseline=12.386401,
        perplexity_llmir=12.386451,
        perplexity_relative_difference=difference,
    )
    shown = printed(replace(comparison, quality=[quality]))
    assert text in shown
    assert "12.386451, vLLM 12.386401" in shown


def test_what_a_budget_cost_is_shown(options: Callable[..., CompareOptions], worker: Sequence[str]):
    text = printed(run([options(workloads=("smoke", "extend"))], worker=worker, budget_seconds=0))
    assert "vLLM: not run, for a budget of 0 min: further pairs, extend\n" in text
    assert "vLLM: pairs 1 of 3; preloaded" in text


def test_without_a_budget_nothing_is_said_of_one(comparison: Comparison):
    assert "for a budget of" not in printed(comparison)


def test_each_framework_is_judged_and_described(both: Comparison):
    text = printed(both)
    for title in ("vLLM", "SGLang"):
        assert f"Against {title}'s own" in text
        assert f"{title} start-up: first 13.0 s, with llmir 14.0 s\n" in text


def test_the_tables_fit_a_terminal_even_with_great_speedups(both: Comparison):
    rows = [replace(row, speedup=123.4, spread=[88.88, 234.5], llmir=123456.7) for row in both.rows]
    text = printed(replace(both, rows=rows))
    assert text.count("123x (88.9-234)") == len(rows)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_chart_is_drawn(both: Comparison, tmp_path: Path, suffix: str):
    path = tmp_path / f"chart{suffix}"
    draw_chart(both, path)
    assert path.stat().st_size > 1000
    assert not list(tmp_path.glob(".chart*"))


def test_an_unknown_chart_format_is_an_error(comparison: Comparison, tmp_path: Path):
    with pytest.raises(LlmirError, match=r"choose from \.png, \.svg"):
        draw_chart(comparison, tmp_path / "chart.doc")
