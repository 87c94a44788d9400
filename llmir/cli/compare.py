"""``llmir compare``: frameworks with and without llmir, side by side, with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from llmir.cli.output import progress

if TYPE_CHECKING:
    from llmir.compare.orchestration import ProgressEvent


#: Stands for every framework that can be compared.
ALL = "all"


def compare(
    framework: Annotated[str, typer.Argument(help="vllm, sglang, or all for one after the other.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's folder, or its name on a model hub.", show_default=False)],
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="short, chat, long, mixed, extend, eighth, brief or smoke. With shared prefixes: shared-prefix,"
            " groups, tree, rollout or multi-turn; prefix_repetition for vllm and generated-shared-prefix for sglang,"
            " by their own generators. May be given several times.",
            show_default="short, chat, long; for sglang short, chat, extend",
        ),
    ] = None,
    pairs: Annotated[
        int | None, typer.Option(help="Pairs of processes, one of each side.", show_default="3; for sglang 2")
    ] = None,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed runs of a workload in each process.", show_default="as the workload says"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="bfloat16, float16 or float32, for both sides.",
            show_default="the framework's own fastest here, measured once",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Minutes: each framework's first pair runs, further ones only while they fit. A workload that cannot"
            " end in time is left out, unless it is a framework's first, and the answers are half as many.",
            show_default="none",
        ),
    ] = None,
    quality: Annotated[bool, typer.Option(help="Whether to compare the answers too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where to write the report as JSON.", show_default=False)] = None,
    chart: Annotated[
        Path | None, typer.Option(help="Where to draw it: .png, .svg or .pdf.", show_default=False)
    ] = None,
) -> None:
    """Serve the same requests with and without llmir: speed, and whether the answers are the same."""
    from llmir.compare import BRIEF_TASK, FRAMEWORKS, CompareOptions, QualityTask, ReportFiles, print_report, run

    asked = [
        CompareOptions(
            model=model,
            framework=name,
            workloads=tuple(workload) if workload else None,
            pairs=pairs,
            dtype=dtype,
            repeats=repeats,
            quality=quality,
            quality_task=BRIEF_TASK if budget is not None else QualityTask(),
        )
        for name in (FRAMEWORKS if framework == ALL else (framework,))
    ]
    files = ReportFiles(json, chart)
    with _shown_progress() as show:
        comparison = run(asked, files, show, budget_seconds=None if budget is None else 60 * budget)
    print_report(comparison)
    for path in filter(None, (json, chart)):
        progress.print(f"wrote {escape(str(path))}", soft_wrap=True)


@contextmanager
def _shown_progress() -> Iterator[Callable[[ProgressEvent], None]]:
    """What shows the progress of a comparison: a bar on a terminal, a line for each event elsewhere."""
    if not progress.is_terminal:
        yield lambda event: progress.print(f"{event.done}/{event.total} {_line(event, event.text)}", soft_wrap=True)
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # A bar that redraws by itself would take time from the cores that are being measured.
    with Progress(*columns, console=progress, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=None)
        yield lambda event: bar.update(
            task,
            completed=event.done,
            total=event.total,
            description=_line(event, event.text.split("\n")[0]),
            refresh=True,
        )


def _line(event: ProgressEvent, text: str) -> str:
    """What happened and how long the rest will take."""
    return escape(f"{text} ({event.left})" if event.left else text)
