from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from llmir.compare.chart import draw_chart
from llmir.compare.comparison import Comparison
from llmir.compare.options import CompareOptions
from llmir.compare.orchestration import run
from llmir.compare.report import print_report
from llmir.errors import LlmirError


@pytest.fixture
def comparison(options: Callable[..., CompareOptions], worker: Sequence[str]) -> Comparison:
    return run(options(pairs=1), worker=worker)


def test_the_table_shows_both_sides_and_the_speedup(comparison: Comparison):
    console = Console(record=True, width=100)
    print_report(comparison, console)
    lines = console.export_text().splitlines()
    (line,) = [line for line in lines if "time per output token" in line]
    assert all(text in line for text in ("smoke", "1.00 s", "500.0 ms", "2.00x"))


@pytest.mark.parametrize("text", ["perplexity", "same greedy text", "start-up: 3.0 s, with llmir 4.0 s (+1.0 s)"])
def test_quality_and_start_up_are_shown(comparison: Comparison, text: str):
    console = Console(record=True, width=100)
    print_report(comparison, console)
    assert text in console.export_text()


def test_the_tables_fit_a_terminal(comparison: Comparison):
    console = Console(record=True, width=80)
    print_report(comparison, console)
    text = console.export_text()
    assert all(label in text for label in ("time per output token ", "log-probability difference, mean "))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_chart_is_drawn(comparison: Comparison, tmp_path: Path, suffix: str):
    path = tmp_path / f"chart{suffix}"
    draw_chart(comparison, path)
    assert path.stat().st_size > 1000
    assert not list(tmp_path.glob(".chart*"))


def test_an_unknown_chart_format_is_an_error(comparison: Comparison, tmp_path: Path):
    with pytest.raises(LlmirError, match=r"choose from \.png, \.svg"):
        draw_chart(comparison, tmp_path / "chart.doc")
