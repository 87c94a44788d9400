"""The ``llmir`` command: compile, explain, compare, check, cache."""

from __future__ import annotations

import sys

import typer

from llmir.cli import cache, check, compare, compile, explain
from llmir.errors import LlmirError

app = typer.Typer(
    help="Compile an LLM's attention and KV-cache kernels for one model on one machine, and serve with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("compile")(compile.compile_model)
app.command("explain")(explain.explain)
app.command("compare")(compare.compare)
app.command("check")(check.check)
app.add_typer(cache.app, name="cache")


def main() -> None:
    """Runs the command line; an error made for the user ends as one sentence on stderr and exit code 1."""
    try:
        app()
    except LlmirError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
