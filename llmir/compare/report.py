"""A comparison as tables on a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from llmir.compare.comparison import Comparison, Row
from llmir.compare.quality import Quality

_FRAMEWORK_NAMES = {"vllm": "vLLM"}


def print_report(comparison: Comparison, console: Console | None = None) -> None:
    """Print speed, quality, start-up and the conditions they were measured under."""
    console = console or Console()
    console.print(speed_table(comparison))
    for quality in comparison.quality:
        console.print(quality_table(quality))
    for line in condition_lines(comparison):
        console.print(line, highlight=False, soft_wrap=True)


def speed_table(comparison: Comparison) -> Table:
    """Each workload's metrics: medians of both sides, median ratio within a pair, its range over the pairs."""
    name = framework_name(comparison)
    table = _table(f"{name} with and without llmir: {comparison.environment['model']}")
    table.add_column("workload")
    table.add_column("metric")
    for heading in (name, "with llmir", "speedup", "over pairs"):
        table.add_column(heading, justify="right")
    last = None
    for row in comparison.rows:
        if last not in (None, row.workload):
            table.add_section()
        low, high = row.spread
        table.add_row(
            row.workload if row.workload != last else "",
            row.metric.removesuffix("_per_second").replace("_", " "),
            amount(row, row.baseline),
            amount(row, row.llmir),
            f"{row.speedup:.2f}x",
            f"{low:.2f}-{high:.2f}",
        )
        last = row.workload
    return table


def quality_table(quality: Quality) -> Table:
    """Agreement of the answers, beside the framework's agreement with itself."""
    name = _FRAMEWORK_NAMES.get(quality.framework, quality.framework)
    table = _table(f"The same answers? Against {name}'s own")
    table.add_column("")
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
        f"{quality.perplexity_llmir:.4f}, {name} {quality.perplexity_baseline:.4f}",
        "",
    )
    table.add_row("perplexity, relative difference", f"{quality.perplexity_relative_difference:.3%}", "")
    return table


def condition_lines(comparison: Comparison) -> list[str]:
    """The few conditions a reader must know; the JSON report has all."""
    facts = comparison.environment
    machine = facts["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    isa = " ".join(machine["isa"])
    preloads = ", ".join(facts["preloads"]) or "nothing"
    load = facts["load_average_before"][0]
    return [
        *(
            f"start-up: {start.baseline:.1f} s, with llmir {start.llmir:.1f} s ({start.extra:+.1f} s)"
            for start in comparison.start_up
        ),
        f"machine: {machine['cpu']}, CPUs {machine['cpus']}, {machine['memory_gib']} GiB; ISA {isa}",
        f"versions: {versions}",
        f"both sides: threads bound to CPUs {facts['thread_binding']}; preloaded {preloads}",
        f"{facts['pairs']} pairs, each side in a fresh process; load average before {load:.1f}",
    ]


def _table(title: str) -> Table:
    # Without outer borders the speed table fits 80 columns.
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def framework_name(comparison: Comparison) -> str:
    """The compared framework as its own people write it."""
    framework = comparison.start_up[0].framework
    return _FRAMEWORK_NAMES.get(framework, framework)


def amount(row: Row, value: float) -> str:
    """A row's value with a unit that reads well."""
    if row.unit != "seconds":
        return f"{value:.1f} /s"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.1f} ms"
