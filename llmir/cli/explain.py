"""``llmir explain``: a plan for a human reader, each decision with what it was compared with and the numbers."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from llmir.ir.import_level import ImportLevel
from llmir.plan import Decision, Plan
from llmir.targets.machine import Target
from llmir.targets.records import TargetError
from llmir.targets.registry import is_gpu

INDENT = (0, 0, 0, 2)
#: Columns where there is no terminal to ask.
PIPED_WIDTH = 120

#: What a plan was made from, in words.
IMPORT_LEVELS: dict[ImportLevel, str] = {
    "full": "full: every layer was read",
    "open": "open: some layers are opaque, by their names and shapes alone",
    "attention": "attention: the attention layers alone were read",
}


def explain(
    plan: Annotated[Path, typer.Argument(help="A plan that `llmir compile` wrote.", show_default=False)],
) -> None:
    """Say what a plan decided and why: each decision, its alternatives, its numbers."""
    contents = Plan.read(plan)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    console.print(_summary(contents))
    for decision in contents.decisions:
        _print_decision(console, decision)
    here = _own_targets()
    if not any(contents.target_fingerprint in own.runnable for own in here):
        machine = " with ".join(own.fingerprint for own in here)
        console.print(
            f"\n[yellow]This plan is for {contents.target_fingerprint}; this machine, {machine}, cannot run it."
        )


def _own_targets() -> list[Target]:
    """This machine, and its GPU if it has one that there are kernels for."""
    own = [Target.detect()]
    with contextlib.suppress(TargetError):
        own.append(Target.named("gpu"))
    return own


def _summary(plan: Plan) -> Table:
    """What the plan is for and what it comes to, a line each."""
    target = Target.from_json(plan.target)
    table = Table.grid(padding=(0, 2))
    rows = {
        "model": f"{plan.model} in {plan.framework} {plan.framework_version}, rank {plan.rank} of {plan.world_size}",
        "import": IMPORT_LEVELS[plan.import_level],
        "target": f"{target.name}: {target.model}, {target.isa}, {target.cores} {_units(target)}",
        "figures": target.figures.origin,
        "workload": f"{plan.workload['name']}: {plan.workload['source']}",
        "KV cache": f"blocks of {plan.block_size} tokens, {plan.element_type}, layout {plan.layout!r}",
    }
    for name, text in rows.items():
        table.add_row(f"[bold]{name}", escape(text))
    for kernel in plan.kernels:
        variants = ", ".join(variant.name for variant in kernel.spec.variants)
        state = "" if kernel.object_key is not None else _not_compiled(target)
        text = f"{kernel.symbol} for {_layers(kernel.layers)} ({variants}{state})"
        table.add_row("[bold]kernel", escape(text))
    return table


def _units(target: Target) -> str:
    """What a target has several of."""
    return {"cuda": "SMs", "hip": "CUs"}.get(target.machine, "cores")


def _not_compiled(target: Target) -> str:
    return "; compiled when serving starts" if is_gpu(target.isa) else "; not compiled when the plan was made"


def _layers(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers, {names[0]} to {names[-1]}"


def _print_decision(console: Console, decision: Decision) -> None:
    console.print(
        f"\n[bold]{escape(decision.subject)}: {escape(decision.decision)}[/] [dim]({escape(decision.pass_name)})[/]"
    )
    console.print(Padding(escape(decision.reason), INDENT))
    console.print(Padding(_numbers(decision.numbers), INDENT))
    for name, value in decision.numbers.items():
        if _is_table(value):
            console.print(Padding(f"[dim]{escape(_words(name))}", (1, 0, 0, 2)))
            console.print(Padding(_rows(value), INDENT))
    if decision.alternatives:
        console.print(Padding(_rows(decision.alternatives), (1, 0, 0, 2)))


def _is_table(value: Any) -> bool:
    """Whether a figure is a list of records, such as the points of a curve."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(item, dict) for item in value)


def _numbers(numbers: dict[str, Any]) -> Table:
    """What a decision rests on, a figure a line; empty figures say nothing, and tables stand apart."""
    table = Table.grid(padding=(0, 2))
    for name, value in numbers.items():
        if _text(value) and not _is_table(value):
            table.add_row(f"[dim]{escape(_words(name))}", escape(_text(value)))
    return table


def _rows(records: Sequence[dict[str, Any]]) -> Table:
    """Records as rows; columns are their fields by name, numbers in a name by size."""
    names = sorted({name for record in records for name in record}, key=_in_order)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        cells = [_text(record[name]) for record in records if name in record]
        # On a narrow terminal figures and words stay whole; headings give way.
        longest = max(max(map(len, cell.split()), default=0) for cell in cells)
        table.add_column(_words(name), min_width=longest, overflow="fold")
    for record in records:
        table.add_row(*(escape(_text(record[name])) if name in record else "" for name in names))
    return table


def _in_order(name: str) -> list[tuple[int, str]]:
    """A key to sort names by, in which 16k comes after 4k."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: Any) -> str:
    """A number to three digits, anything else as it is; lists and dictionaries item by item."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    if isinstance(value, dict):
        return ", ".join(f"{_words(str(name))} {_text(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return str(value)
