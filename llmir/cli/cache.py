"""``llmir cache``: what llmir keeps on disk, how much it is, and how to be rid of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmir.cache import FOLDERS, KEPT_DAYS, KeptFolder, UntrustedError
from llmir.errors import LlmirError

app = typer.Typer(help="Show what llmir keeps on disk, or remove it.", no_args_is_help=True)
_MEGABYTE = 1e6


@app.command()
def show() -> None:
    """Say where llmir keeps what, and how much of it there is."""
    root = _root()
    console = Console(highlight=False, soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    for name in FOLDERS:
        try:
            entries, size = KeptFolder(root / name).size()
        except UntrustedError as error:
            table.add_row(name, "not used", escape(str(error)))
        except OSError as error:
            table.add_row(name, "not readable", escape(str(error.strerror)))
        else:
            table.add_row(name, f"{entries} entries", f"{size / _MEGABYTE:.1f} MB")
    console.print(escape(str(root)))
    console.print(table)


@app.command()
def prune(
    days: Annotated[float, typer.Option(help="Remove what was not used for so many days.", min=0.0)] = KEPT_DAYS,
) -> None:
    """Remove what was not used for long, and what ended processes left; done by itself whenever a plan is made."""
    _remove(days)


@app.command()
def clear() -> None:
    """Remove everything that is kept; the next start compiles again."""
    _remove(0.0)


def _remove(days: float) -> None:
    """Remove what is that old, and say how much it was; LlmirError where a folder cannot be emptied."""
    root = _root()
    try:
        removed = sum(KeptFolder(root / name).prune(days) for name in FOLDERS)
    except OSError as error:
        raise LlmirError(
            f"cannot remove what is in {root} ({error.strerror}): run this as the user it belongs to"
        ) from error
    Console(highlight=False, soft_wrap=True).print(f"removed {removed} entries from {escape(str(root))}")


def _root() -> Path:
    from llmir.compiler import cache_folder

    return cache_folder()
