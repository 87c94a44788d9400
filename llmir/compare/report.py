"""A comparison as tables on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from llmir.compare.comparison import Comparison, Row, StartUpTimes
from llmir.compare.dtype import describe
from llmir.compare.frameworks import framework_named
from llmir.compare.measuring import METRICS
from llmir.compare.quality import Quality
from llmir.compare.workloads import workload_named

#: Columns that every table fits into.
_WIDTH = 100


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print speed, quality, start-up and the conditions they were measured under."""
    # Without a terminal there is no width to keep to, only that of the tables.
    console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
    for workload in workloads(comparison):
        console.print(speed_table([row for row in comparison.rows if row.workload == workload]))
    for quality in comparison.quality:
        console.print(quality_table(quality))
    for line in condition_lines(comparison):
        console.print(line, highlight=False, soft_wrap=True)


def workloads(comparison: Comparison) -> list[str]:
    """The workloads that were run, each once, in the order of the rows."""
    return list(dict.fromkeys(row.workload for row in comparison.rows))


def speed_table(rows: Sequence[Row]) -> Table:
    """One workload: two lines a framework, medians of both sides; with llmir's the speedup.

    A speedup is the median of the ratios within a pair; its range over the pairs stands in brackets.
    """
    workload = rows[0].workload
    table = _table(f"{workload}: {workload_named(workload).description}")
    table.add_column("", no_wrap=True)
    metrics = [metric.name for metric in METRICS if any(row.metric == metric.name for row in rows)]
    for metric in metrics:
        table.add_column(heading(metric), justify="right")
    for framework in dict.fromkeys(row.framework for row in rows):
        title = framework_named(framework).title
        of_metric = {row.metric: row for row in rows if row.framework == framework}
        cells = [of_metric.get(metric) for metric in metrics]
        table.add_row(title, *(amount(row, row.baseline) if row else "" for row in cells))
        table.add_row(
            f"{title} with llmir", *(f"{amount(row, row.llmir)}\n{speedup(row)}" if row else "" for row in cells)
        )
    return table


def quality_table(quality: Quality) -> Table:
    """Agreement of the answers, beside the framework's agreement with itself."""
    name = framework_named(quality.framework).title
    table = _table(f"The same answers? Against {name}'s own")
    table.add_column("", no_wrap=True)
    table.add_column("llmir", justify="right")
    table.add_column(f"{name} prefix-cached", justify="right")
    table.add_row(
        f"same greedy text, of {quality.prompts} prompts",
        f"{quality.greedy_agreement:.0%}",
        f"{quality.greedy_agreement_baseline_with_itself:.0%}",
    )
    table.add_row(
        "log-probability difference, mean",
        f"{quality.mean_logprob_difference:.2g}",
        f"{quality.mean_logprob_difference_baseline_with_itself:.2g}",
    )
    table.add_row(
        "log-probability difference, max",
        f"{quality.max_logprob_difference:.2g}",
        f"{quality.max_logprob_difference_baseline_with_itself:.2g}",
    )
    table.add_row(
        f"perplexity of {quality.text_tokens} tokens",
        f"{quality.perplexity_llmir:.6f}, {name} {quality.perplexity_baseline:.6f}",
        "",
    )
    table.add_row("perplexity, relative difference", _percent(quality.perplexity_relative_difference), "")
    return table


def condition_lines(comparison: Comparison) -> list[str]:
    """The few conditions a reader must know; the JSON report has all."""
    facts = comparison.environment
    machine, load = facts["machine"], facts["load_average_before"][0]
    lines = [_start_up_line(start_up) for start_up in comparison.start_up]
    for name, conditions in facts["frameworks"].items():
        lines += _framework_lines(name, conditions)
    return [
        *lines,
        f"{machine['cpu']}, CPUs {machine['cpus']}, {machine['memory_gib']} GiB; ISA {' '.join(machine['isa'])}",
        f"model {facts['model']}; each side in a fresh process; load average before {load:.1f}",
    ]


def _start_up_line(start_up: StartUpTimes) -> str:
    title = framework_named(start_up.framework).title
    line = f"{title} start-up: first {start_up.baseline_first:.1f} s, with llmir {start_up.llmir_first:.1f} s"
    if start_up.baseline_later is None or start_up.llmir_later is None:
        return line
    return f"{line}; later {start_up.baseline_later:.1f} s, with llmir {start_up.llmir_later:.1f} s"


def _framework_lines(name: str, conditions: dict[str, Any]) -> list[str]:
    framework = framework_named(name)
    sides = [
        ", ".join(condition.format_map(settings) for condition in framework.conditions)
        for settings in (conditions["settings"]["baseline"], conditions["settings"]["llmir"])
    ]
    versions = ", ".join(f"{package} {version}" for package, version in conditions["versions"].items())
    preloads = ", ".join(conditions["preloads"]) or "nothing"
    ran, asked = conditions["pairs"], conditions["pairs_asked_for"]
    pairs = str(ran) if ran == asked else f"{ran} of {asked}"
    return [
        f"{framework.title}: {sides[0]}; with llmir: {sides[1]}",
        f"{framework.title}: dtype {describe(conditions['dtype'], framework.title)}",
        *_budget_lines(framework.title, conditions),
        f"{framework.title}: pairs {pairs}; preloaded {preloads}; {versions}",
    ]


def _budget_lines(title: str, conditions: dict[str, Any]) -> list[str]:
    """What a budget cost a comparison."""
    fewer = conditions["pairs"] < conditions["pairs_asked_for"]
    left_out = conditions["left_out_for_the_budget"]
    if not fewer and not left_out:
        return []
    missing = [*(["further pairs"] if fewer else []), *left_out]
    minutes = conditions["budget_seconds"] / 60
    return [f"{title}: not run, for a budget of {minutes:.0f} min: {', '.join(missing)}"]


def _table(title: str) -> Table:
    # Without outer borders four metrics with their speedups fit.
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def heading(metric: str) -> str:
    """A metric's name for a reader."""
    return metric.removesuffix("_per_second").replace("_", " ")


def amount(row: Row, value: float) -> str:
    """A row's value with a unit that reads well."""
    if row.unit != "seconds":
        return f"{value:.1f} /s"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"


def speedup(row: Row) -> str:
    """A row's speedup and its range over the pairs, in brackets."""
    low, high = row.spread
    return f"{_ratio(row.speedup)}x ({_ratio(low)}-{_ratio(high)})"


def _percent(share: float) -> str:
    """Three decimals, or as many as show two digits, down to where float32 itself ends."""
    if 0 < share < 1e-6:
        return "below 0.0001%"
    return f"{share:.3%}" if share >= 1e-4 or share == 0 else f"{100 * share:.2g}%"


def _ratio(value: float) -> str:
    """Three digits: more would be noise."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
