"""A comparison as a picture: a row of panels for each workload, a panel for each metric, two bars a framework."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmir.compare.comparison import Comparison, Row
from llmir.compare.files import write_whole
from llmir.compare.frameworks import framework_named
from llmir.compare.measuring import METRICS, Metric
from llmir.compare.report import amount, heading, speedup, workloads
from llmir.errors import LlmirError

FORMATS = (".png", ".svg", ".pdf")

_BASELINE_COLOUR, _LLMIR_COLOUR = "#9aa5b1", "#1f6feb"
#: Inches.
_PANEL_WIDTH, _BAR_HEIGHT, _PANEL_MARGINS = 4.5, 0.36, 0.9


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
    names = workloads(comparison)
    titles = [framework_named(name).title for name in comparison.environment["frameworks"]]
    height = len(names) * (2 * len(titles) * _BAR_HEIGHT + _PANEL_MARGINS) + _PANEL_MARGINS
    figure = Figure(figsize=(_PANEL_WIDTH * len(METRICS), height), layout="constrained")
    panels = figure.subplots(max(1, len(names)), len(METRICS), squeeze=False)
    for workload, row_of_panels in zip(names, panels, strict=False):
        for metric, axes in zip(METRICS, row_of_panels, strict=True):
            rows = [row for row in comparison.rows if (row.workload, row.metric) == (workload, metric.name)]
            if rows:
                _panel(axes, metric, rows)
            else:
                axes.set_axis_off()  # a metric that this workload does not have
    figure.suptitle(f"{' and '.join(titles)} with and without llmir, {comparison.environment['model']}")
    write_whole(path, lambda partial: figure.savefig(partial, dpi=100))


def _panel(axes: Any, metric: Metric, rows: Sequence[Row]) -> None:
    names: list[str] = []
    for row in rows:
        title = framework_named(row.framework).title
        for name, value, colour, text in (
            (title, row.baseline, _BASELINE_COLOUR, amount(row, row.baseline)),
            (f"{title} with llmir", row.llmir, _LLMIR_COLOUR, f"{amount(row, row.llmir)}\n{speedup(row)}"),
        ):
            bars = axes.barh(len(names), value, color=colour)
            axes.bar_label(bars, [text], padding=3, fontsize=8)
            names.append(name)
    better = "less is better" if metric.lower_is_better else "more is better"
    unit = "seconds" if metric.unit == "seconds" else "a second"
    axes.set_title(f"{rows[0].workload}: {heading(metric.name)} ({unit}; {better})", fontsize=9)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.5)  # room for the text behind the longest bar
    axes.spines[["top", "right"]].set_visible(False)
