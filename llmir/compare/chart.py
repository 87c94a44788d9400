"""A comparison as a picture: one panel a metric, two bars a workload, the speedup above them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmir.compare.comparison import Comparison, Row
from llmir.compare.files import write_whole
from llmir.compare.measuring import METRICS, Metric
from llmir.compare.report import amount, framework_name
from llmir.errors import LlmirError

FORMATS = (".png", ".svg", ".pdf")

_BAR_WIDTH = 0.38
_BASELINE_COLOUR, _LLMIR_COLOUR = "#9aa5b1", "#1f6feb"


def check_format(path: Path) -> None:
    """Raise :class:`LlmirError` if the suffix of ``path`` names no format of a chart."""
    if path.suffix not in FORMATS:
        raise LlmirError(f"cannot draw {path}: its suffix names no picture format; choose from {', '.join(FORMATS)}")


def draw_chart(comparison: Comparison, path: Path) -> None:
    """Draw the rows into a picture at ``path``, whole or not at all.

    Raises :class:`LlmirError` for a format not in :data:`FORMATS`.
    """
    from matplotlib.figure import Figure  # slow to import, and only charts need it

    check_format(path)
    figure = Figure(figsize=(10, 7), layout="constrained")
    name = framework_name(comparison)
    panels = list(figure.subplots(2, 2).flat)
    for metric, axes in zip(METRICS, panels, strict=True):
        _panel(axes, metric, [row for row in comparison.rows if row.metric == metric.name], name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(f"{name} with and without llmir, {comparison.environment['model']}")
    write_whole(path, lambda partial: figure.savefig(partial, dpi=150))


def _panel(axes: Any, metric: Metric, rows: list[Row], name: str) -> None:
    for i, row in enumerate(rows):
        axes.bar(i - _BAR_WIDTH / 2, row.baseline, _BAR_WIDTH, color=_BASELINE_COLOUR, label=name if i == 0 else None)
        axes.bar(i + _BAR_WIDTH / 2, row.llmir, _BAR_WIDTH, color=_LLMIR_COLOUR, label="with llmir" if i == 0 else None)
        top = max(row.baseline, row.llmir)
        axes.annotate(
            f"{row.speedup:.2f}x\n{amount(row, row.baseline)} | {amount(row, row.llmir)}",
            (i, top),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    unit = "seconds; " if metric.unit == "seconds" else ""  # the other names carry theirs
    better = "less is better" if metric.lower_is_better else "more is better"
    axes.set_title(f"{metric.name.replace('_', ' ')} ({unit}{better})", fontsize=10)
    axes.set_xticks(range(len(rows)), [row.workload for row in rows])
    axes.margins(y=0.25)
    axes.spines[["top", "right"]].set_visible(False)
