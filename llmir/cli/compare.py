"""``llmir compare``: a framework with and without llmir, side by side, with a report."""

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


def compare(
    framework: Annotated[str, typer.Argument(help="The framework to compare: vllm.", show_default=False)],
    model: Annotated[str, typer.Option(help="A model's folder, or its name on a model hub.", show_default=False)],
    workload: Annotated[
        list[str] | None,
        typer.Option(help="short, chat, long or mixed; may be given several times.", show_default="short, chat, long"),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of processes, one of each side.")] = 3,
    repeats: Annotated[
        int | None,
        typer.Option(help="Timed runs of a workload in each process.", show_default="as the workload says"),
    ] = None,
    quality: Annotated[bool, typer.Option(help="Whether to compare the answers too.")] = True,
    json: Annotated[Path | None, typer.Option(help="Where to write the report as JSON.", show_default=False)] = None,
    chart: Annotated[
        Path | None, typer.Option(help="Where to draw it: .png, .svg or .pdf.", show_default=False)
    ] = None,
) -> None:
    """Serve the same requests with and without llmir: speed, and whether the answers are the same."""
    from llmir.compare.options import DEFAULT_WORKLOADS, CompareOptions
    from llmir.compare.orchestration import run
    from llmir.compare.report import print_report

    options = CompareOptions(
        model=model,
        framework=framework,
        workloads=tuple(workload or DEFAULT_WORKLOADS),
        pairs=pairs,
        repeats=repeats,
        quality=quality,
        json_path=json,
        chart_path=chart,
    )
    with _shown_progress() as show:
        comparison = run(options, show)
    print_report(comparison)
    for path in filter(None, (json, chart)):
        progress.print(f"wrote {escape(str(path))}", soft_wrap=True)


@contextmanager
def _shown_progress() -> Iterator[Callable[[ProgressEvent], None]]:
    """What shows the progress of a comparison: a bar on a terminal, a line for each event elsewhere."""
    if not progress.is_terminal:
        yield lambda event: progress.print(f"{event.done}/{event.total} {escape(event.text)}", soft_wrap=True)
        return
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=progress, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda event: bar.update(
            task, completed=event.done, total=event.total, description=escape(event.text.split("\n")[0])
        )
