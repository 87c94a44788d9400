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
    """Seconds from the start of the process until it can serve: medians over the pairs."""

    framework: str
    baseline: float
    llmir: float
    extra: float
    """Median over the pairs of llmir's less the baseline's."""
    baseline_values: list[dict[str, float]]
    llmir_values: list[dict[str, float]]


@dataclass(frozen=True)
class Comparison:
    """Everything a report shows."""

    rows: list[Row]
    quality: list[Quality]
    start_up: list[StartUpTimes]
    environment: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, keys as the fields are named."""
        return asdict(self)


def compare_results(
    framework: str, workloads: Sequence[str], results: Mapping[str, Sequence[Result]], environment: dict[str, Any]
) -> Comparison:
    """Set ``results["baseline"]`` and ``results["llmir"]``, one result of each a pair, against each other.

    Raises :class:`LlmirError` if a run cannot be measured.
    """
    baseline, llmir = results["baseline"], results["llmir"]
    rows = []
    for workload in workloads:
        of_baseline, of_llmir = ([_figures_of(result, workload) for result in side] for side in (baseline, llmir))
        rows += [_row(framework, workload, metric, of_baseline, of_llmir) for metric in METRICS]
    answers = [(b.answers, m.answers) for b, m in zip(baseline, llmir, strict=True)]
    quality = [judge(framework, b, m) for b, m in answers if b is not None and m is not None]
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
    pairs = [(b.start_up.total_seconds, m.start_up.total_seconds) for b, m in zip(baseline, llmir, strict=True)]
    return StartUpTimes(
        framework=framework,
        baseline=median(b for b, _ in pairs),
        llmir=median(m for _, m in pairs),
        extra=median(m - b for b, m in pairs),
        baseline_values=[asdict(result.start_up) for result in baseline],
        llmir_values=[asdict(result.start_up) for result in llmir],
    )
