"""Runs a comparison: fresh processes, the sides alternating, and figures made of what they measured."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmir.compare.chart import draw_chart
from llmir.compare.comparison import Comparison, compare_results
from llmir.compare.environment import child_environment, readable_path, record
from llmir.compare.files import write_json
from llmir.compare.job import Result
from llmir.compare.options import CompareOptions
from llmir.compare.process import run_worker
from llmir.compare.workloads import workload_named

WORKER = (sys.executable, "-m", "llmir.compare.worker")
#: A load average above this before the first process means that somebody else is using the machine.
_IDLE_LOAD = 0.5


@dataclass(frozen=True)
class ProgressEvent:
    """Something happened: ``done`` of ``total`` processes are finished, and a line about it."""

    done: int
    total: int
    text: str


def order(pairs: int) -> Iterator[tuple[int, str]]:
    """(pair, side) in the order of running: each pair starts with the side the last one ended with.

    So neither side always runs first, and a drift of the machine falls on both alike.
    """
    for pair in range(pairs):
        sides = ("baseline", "llmir") if pair % 2 == 0 else ("llmir", "baseline")
        for side in sides:
            yield pair, side


def run(
    options: CompareOptions,
    progress: Callable[[ProgressEvent], None] | None = None,
    worker: Sequence[str] = WORKER,
) -> Comparison:
    """Run both sides of a comparison and write its report where the options say.

    ``worker`` is the command of one side's process; it gets the path of a job file. Raises
    :class:`LlmirError` if a side fails; no report is written then.
    """
    tell = progress or (lambda event: None)
    environment = child_environment(options.model)
    facts = record(environment)
    total = 2 * options.pairs
    if os.getloadavg()[0] > _IDLE_LOAD:
        tell(ProgressEvent(0, total, f"this machine is busy (load average {os.getloadavg()[0]:.1f}): expect noise"))

    results: dict[str, list[Result]] = {"baseline": [], "llmir": []}
    loads: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="llmir-compare-") as folder:
        for done, (pair, side) in enumerate(order(options.pairs)):
            where = f"{side}, pair {pair + 1} of {options.pairs}"
            tell(ProgressEvent(done, total, f"{where}: starting"))
            loads.append({"pair": pair + 1, "side": side, "load_average": os.getloadavg()[0]})

            def announce(line: str, done: int = done, where: str = where) -> None:
                tell(ProgressEvent(done, total, f"{where}: {line}"))

            # Answers do not change from pair to pair: one process of each side is asked.
            result = run_worker(worker, options, side, pair == 0, environment, Path(folder, f"{pair}-{side}"), announce)
            results[side].append(result)
    tell(ProgressEvent(total, total, "all runs done"))

    facts |= _conditions(options, results, loads)
    comparison = compare_results(options.framework, tuple(options.runs()), results, facts)
    if options.json_path is not None:
        write_json(options.json_path, comparison.to_json())
    if options.chart_path is not None:
        draw_chart(comparison, options.chart_path)
    return comparison


def _conditions(options: CompareOptions, results: dict[str, list[Result]], loads: list[dict[str, Any]]) -> dict:
    return {
        "model": readable_path(options.model),
        "settings": {side: of_side[0].settings for side, of_side in results.items()},
        "workloads": {
            name: {"description": workload_named(name).description, "repeats": repeats}
            for name, repeats in options.runs().items()
        },
        "pairs": options.pairs,
        "seed": options.seed,
        "load_average_at_start_of": loads,
    }
