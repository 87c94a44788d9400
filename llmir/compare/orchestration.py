"""Runs comparisons: fresh processes, the sides alternating, and figures made of what they measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmir.compare.chart import check_format, draw_chart
from llmir.compare.comparison import Comparison, compare_results, side_by_side
from llmir.compare.environment import child_environment, recorded
from llmir.compare.files import check_writable, write_json
from llmir.compare.frameworks import framework_named
from llmir.compare.interpreter import Interpreter, interpreter_with
from llmir.compare.job import Result
from llmir.compare.machine import readable_path, record
from llmir.compare.options import CompareOptions
from llmir.compare.process import run_worker
from llmir.compare.workloads import workload_named

_WORKER = ("-m", "llmir.compare.worker")
#: A load average above this before the first process means that somebody else is using the machine.
_IDLE_LOAD = 0.5

Progress = Callable[["ProgressEvent"], None]


@dataclass(frozen=True)
class ProgressEvent:
    """Something happened: ``done`` of ``total`` processes are finished, and a line about it."""

    done: int
    total: int
    text: str


@dataclass(frozen=True)
class ReportFiles:
    """Where a report is written.

    Raises :class:`LlmirError` before anything runs for a place that cannot be written to, or for a chart whose
    suffix names no format (.png, .svg or .pdf).
    """

    json: Path | None = None
    chart: Path | None = None

    def __post_init__(self) -> None:
        if self.chart is not None:
            check_format(self.chart)
        for path in (self.json, self.chart):
            if path is not None:
                check_writable(path)

    def write(self, comparison: Comparison) -> None:
        """Write what was asked for, each file whole or not at all."""
        if self.json is not None:
            write_json(self.json, comparison.to_json())
        if self.chart is not None:
            draw_chart(comparison, self.chart)


@dataclass
class _Runs:
    """What the processes of one framework measured so far."""

    results: dict[str, list[Result]] = field(default_factory=lambda: {"baseline": [], "llmir": []})
    loads: list[dict[str, Any]] = field(default_factory=list)


def order(pairs: int) -> Iterator[tuple[int, str]]:
    """(pair, side) in the order of running: each pair starts with the side the last one ended with.

    So neither side always runs first, and a drift of the machine falls on both alike.
    """
    for pair in range(pairs):
        sides = ("baseline", "llmir") if pair % 2 == 0 else ("llmir", "baseline")
        for side in sides:
            yield pair, side


def run(
    asked: Sequence[CompareOptions],
    files: ReportFiles | None = None,
    progress: Progress | None = None,
    worker: Sequence[str] = _WORKER,
) -> Comparison:
    """Compare one framework after another and write one report of all.

    ``worker`` is what an interpreter is given to be one side's process; the path of a job file follows. Raises
    :class:`LlmirError` if a framework is not installed or a side fails; no report is written then.
    """
    tell = progress or (lambda event: None)
    # Before the first of them runs for minutes, every framework is looked for.
    interpreters = [interpreter_with(options.framework) for options in asked]
    facts = record() | {"model": readable_path(asked[0].model), "seed": asked[0].seed}
    total = sum(2 * options.pair_count() for options in asked)
    if (load := os.getloadavg()[0]) > _IDLE_LOAD:
        tell(ProgressEvent(0, total, f"this machine is busy (load average {load:.1f}): expect noise"))
    done, parts = 0, []
    for options, interpreter in zip(asked, interpreters, strict=True):
        parts.append(_run_one(options, interpreter, worker, done, total, tell))
        done += 2 * options.pair_count()
    tell(ProgressEvent(total, total, "all runs done"))
    comparison = side_by_side(parts, facts)
    if files is not None:
        files.write(comparison)
    return comparison


def _run_one(
    options: CompareOptions, interpreter: Interpreter, worker: Sequence[str], done: int, total: int, tell: Progress
) -> Comparison:
    """Compare one framework; ``done`` of ``total`` processes were finished before."""
    framework = framework_named(options.framework)
    environment = child_environment(framework, options.model, interpreter.prefix)
    command = [interpreter.executable, *worker]
    runs = _Runs()
    with tempfile.TemporaryDirectory(prefix="llmir-compare-") as folder:
        for finished, (pair, side) in enumerate(order(options.pair_count()), done):
            where = f"{framework.title} {side}, pair {pair + 1} of {options.pair_count()}"
            tell(ProgressEvent(finished, total, f"{where}: starting"))
            runs.loads.append({"pair": pair + 1, "side": side, "load_average": os.getloadavg()[0]})

            def announce(line: str, finished: int = finished, where: str = where) -> None:
                tell(ProgressEvent(finished, total, f"{where}: {line}"))

            # Answers do not change from pair to pair: one process of each side is asked.
            stem = Path(folder, f"{pair}-{side}")
            result = run_worker(command, options, side, pair == 0, environment, stem, announce)
            runs.results[side].append(result)
    conditions = _conditions(options, runs) | recorded(framework, environment)
    return compare_results(framework.name, tuple(options.runs()), runs.results, conditions)


def _conditions(options: CompareOptions, runs: _Runs) -> dict[str, Any]:
    first = {side: of_side[0] for side, of_side in runs.results.items()}
    return {
        "versions": first["baseline"].versions,
        "settings": {side: result.settings for side, result in first.items()},
        "workloads": {
            name: {
                "description": workload_named(name).description,
                "repeats": repeats,
                "cached_tokens": {side: result.cached_tokens(name) for side, result in first.items()},
            }
            for name, repeats in options.runs().items()
        },
        "pairs": options.pair_count(),
        "load_average_at_start_of": runs.loads,
    }
