"""The outcome of a comparison: rows of figures, quality, start-up, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from llmir.compare.job import Result
from llmir.compare.measuring import METRICS, Metric, figures, median_figures
from llmir.compare.quality import Quality, judge


@dataclass(frozen=True)
class Row:
    """One metric of one workload."""

    framework: str
    workload: str
    metric: str
    baseline: float
    """Median over the pairs, in the metric's unit."""
    llmir: float
    speedup: float
    """Median over the pairs of the ratio within a pair; above 1 llmir is better."""
    unit: str
    baseline_values: list[float]
    """One for each pair: the median of that process's timed runs."""
    llmir_values: list[float]
    speedups: list[float]
    spread: list[float]
    """Least and greatest of ``speedups``."""


@dataclass(frozen=True)
class StartUpTimes:
    """Seconds from the start of the process until it can serve.

    Each side's first start stands apart: it may find caches empty, and then compiles.
    """

    framework: str
    baseline_first: float
    llmir_first: float
    baseline_later: float | None
    """Median over the later starts; None if there is one pair."""
    llmir_later: float | None
    baseline_values: list[dict[str, float]]
    llmir_values: list[dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows."""

    rows: list[Row]
    quality: list[Quality]
    start_up: list[StartUpTimes]
    environment: dict[str, Any]
    """Machine, commit and model; under ``frameworks``, by name, versions, settings and other conditions of each."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, keys as the fields are named."""
        return asdict(self)


def side_by_side(parts: Sequence[Comparison], facts: dict[str, Any]) -> Comparison:
    """One comparison of several frameworks out of one each, on the machine described by ``facts``."""
    frameworks = {name: conditions for part in parts for name, conditions in part.environment["frameworks"].items()}
    return Comparison(
        rows=[row for part in parts for row in part.rows],
        quality=[quality for part in parts for quality in part.quality],
        start_up=[start_up for part in parts for start_up in part.start_up],
        environment=facts | {"frameworks": frameworks},
    )


def compare_results(
    framework: str, workloads: Sequence[str], results: Mapping[str, Sequence[Result]], conditions: dict[str, Any]
) -> Comparison:
    """Set ``results["baseline"]`` and ``results["llmir"]``, one result of each a pair, against each other.

    Raises :class:`LlmirError` if a run cannot be measured.
    """
    baseline, llmir = results["baseline"], results["llmir"]
    rows = []
    for workload in workloads:
        of_baseline, of_llmir = ([_figures_of(result, workload) for result in side] for side in (baseline, llmir))
        rows += [
            _row(framework, workload, metric, of_baseline, of_llmir)
            for metric in METRICS
            if metric.name in of_baseline[0]
        ]
    answers = [(b.answers, m.answers) for b, m in zip(baseline, llmir, strict=True)]
    quality = [judge(framework, b, m) for b, m in answers if b is not None and m is not None]
    environment = {"frameworks": {framework: conditions}}
    return Comparison(rows, quality, [_start_up(framework, baseline, llmir)], environment)


def _figures_of(result: Result, workload: str) -> dict[str, float]:
    return median_figures([figures(records) for records in result.runs[workload]])


def _row(
    framework: str,
    workload: str,
    metric: Metric,
    baseline: Sequence[dict[str, float]],
    llmir: Sequence[dict[str, float]],
) -> Row:
    baseline_values = [pair[metric.name] for pair in baseline]
    llmir_values = [pair[metric.name] for pair in llmir]
    speedups = [metric.speedup(b, m) for b, m in zip(baseline_values, llmir_values, strict=True)]
    return Row(
        framework=framework,
        workload=workload,
        metric=metric.name,
        baseline=median(baseline_values),
        llmir=median(llmir_values),
        speedup=median(speedups),
        unit=metric.unit,
        baseline_values=baseline_values,
        llmir_values=llmir_values,
        speedups=speedups,
        spread=[min(speedups), max(speedups)],
    )


def _start_up(framework: str, baseline: Sequence[Result], llmir: Sequence[Result]) -> StartUpTimes:
    seconds = {
        side: [result.start_up.total_seconds for result in results]
        for side, results in (("baseline", baseline), ("llmir", llmir))
    }
    later = {side: median(values[1:]) if len(values) > 1 else None for side, values in seconds.items()}
    return StartUpTimes(
        framework=framework,
        baseline_first=seconds["baseline"][0],
        llmir_first=seconds["llmir"][0],
        baseline_later=later["baseline"],
        llmir_later=later["llmir"],
        baseline_values=[asdict(result.start_up) for result in baseline],
        llmir_values=[asdict(result.start_up) for result in llmir],
    )
