"""Runs comparisons: fresh processes, the sides alternating, and figures made of what they measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmir.child import SAFE_PATH
from llmir.compare.chart import check_format, draw_chart
from llmir.compare.comparison import Comparison, compare_results, side_by_side
from llmir.compare.dtype import Choice, choose
from llmir.compare.environment import child_environment, recorded
from llmir.compare.files import check_writable, write_json
from llmir.compare.frameworks import framework_named
from llmir.compare.interpreter import Interpreter, interpreter_with
from llmir.compare.job import Result, announced_step
from llmir.compare.machine import readable_path, record
from llmir.compare.options import CompareOptions
from llmir.compare.process import Limits, run_worker
from llmir.compare.schedule import SIDES, Process, Schedule
from llmir.compare.workloads import workload_named

_WORKER = (SAFE_PATH, "-m", "llmir.compare.worker")
#: A load average above this before the first process means that somebody else is using the machine.
_IDLE_LOAD = 0.5

Progress = Callable[["ProgressEvent"], None]


@dataclass(frozen=True)
class ProgressEvent:
    """Something happened: ``done`` of ``total`` processes are finished, and a line about it."""

    done: int
    total: int
    """May become less where there is a budget."""
    text: str
    left: str = ""
    """How long everything will still take, in words; empty where nothing can be said yet."""


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


def run(
    asked: Sequence[CompareOptions],
    files: ReportFiles | None = None,
    progress: Progress | None = None,
    worker: Sequence[str] = _WORKER,
    budget_seconds: float | None = None,
) -> Comparison:
    """Compare frameworks and write one report of all: what is the same for both sides is decided first, then pairs run.

    ``worker`` is what an interpreter is given to be one side's process; the path of a job file follows.
    ``budget_seconds``: see :class:`Schedule`; a workload that cannot end within it is left out, but never a framework's
    first, nor the quality check. Raises :class:`LlmirError` if a framework is not installed or a side fails; no report
    is written then.
    """
    schedule = Schedule(asked, budget_seconds)

    def tell(text: str) -> None:
        if progress is not None:
            done, total = schedule.finished, schedule.total()
            progress(ProgressEvent(done, total, text, str(schedule.left()) if done < total else ""))

    # Before the first of them runs for minutes, every framework is looked for.
    interpreters = [interpreter_with(options.framework) for options in asked]
    facts = record() | {"model": readable_path(asked[0].model), "seed": asked[0].seed}
    if (load := os.getloadavg()[0]) > _IDLE_LOAD:
        tell(f"this machine is busy (load average {load:.1f}): expect noise")
    frameworks = [
        _Framework.prepare(options, interpreter, worker, tell)
        for options, interpreter in zip(asked, interpreters, strict=True)
    ]
    while (process := schedule.next()) is not None:
        frameworks[process.framework].run(process, schedule, tell)
    tell("all runs done")
    comparison = side_by_side([framework.outcome(budget_seconds) for framework in frameworks], facts)
    if files is not None:
        files.write(comparison)
    return comparison


@dataclass
class _Framework:
    """One framework of a comparison: how its processes are started, and what they measured so far."""

    options: CompareOptions
    """The dtype is decided."""
    choice: Choice
    command: Sequence[str]
    environment: dict[str, str]
    results: dict[str, list[Result]] = field(default_factory=lambda: {side: [] for side in SIDES})
    loads: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def prepare(
        cls, options: CompareOptions, interpreter: Interpreter, worker: Sequence[str], tell: Callable[[str], None]
    ) -> _Framework:
        """Decide what both sides have in common."""
        framework = framework_named(options.framework)
        environment = child_environment(framework, options.model, interpreter.prefix)

        def say(line: str) -> None:
            tell(f"{framework.title} dtype: {line}")

        choice = choose(options, interpreter, environment, worker, say)
        options = replace(options, dtype=choice.dtype)
        return cls(options, choice, [interpreter.executable, *worker], environment)

    def run(self, process: Process, schedule: Schedule, tell: Callable[[str], None]) -> None:
        """Run one process to its end."""
        options = self.options
        title = framework_named(options.framework).title
        where = f"{title} {process.side}, pair {process.pair + 1} of {options.pair_count()}"
        limits = Limits(allotted=schedule.allotted(process))
        schedule.begin(process)
        tell(f"{where}: starting")
        self.loads.append({"pair": process.pair + 1, "side": process.side, "load_average": os.getloadavg()[0]})

        def announce(line: str) -> None:
            schedule.done(announced_step(line))
            tell(f"{where}: {line}")

        with tempfile.TemporaryDirectory(prefix="llmir-compare-") as folder:
            stem = Path(folder, process.side)
            result = run_worker(
                self.command, options, process.side, process.pair == 0, self.environment, stem, announce, limits
            )
        self.results[process.side].append(result)
        if left_out := [name for name in options.runs() if name not in result.runs]:
            schedule.leave_out(process.framework, left_out)
            self.options = replace(self.options, left_out=tuple(left_out))
            tell(f"{title}: {', '.join(left_out)} left out on both sides, it would not end within the budget")
        schedule.end()

    def outcome(self, budget_seconds: float | None) -> Comparison:
        """What all of its processes measured."""
        framework = framework_named(self.options.framework)
        conditions = self._conditions(budget_seconds) | recorded(framework, self.environment)
        return compare_results(framework.name, tuple(self.options.runs()), self.results, conditions)

    def _conditions(self, budget_seconds: float | None) -> dict[str, Any]:
        first = {side: of_side[0] for side, of_side in self.results.items()}
        return {
            "versions": first["baseline"].versions,
            "settings": {side: result.settings for side, result in first.items()},
            "dtype": self.choice.to_json(),
            "workloads": {
                name: {
                    "description": workload_named(name).description,
                    "repeats": repeats,
                    "cached_tokens": {side: result.cached_tokens(name) for side, result in first.items()},
                }
                for name, repeats in self.options.runs().items()
            },
            "pairs": len(self.results["baseline"]),
            "pairs_asked_for": self.options.pair_count(),
            "budget_seconds": budget_seconds,
            "left_out_for_the_budget": list(self.options.left_out),
            "load_average_at_start_of": self.loads,
        }
