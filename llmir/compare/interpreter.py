"""Which Python runs a framework: frameworks that cannot live in one environment have one each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from llmir.errors import LlmirError

#: Where `make .venvs/<framework>` puts an environment, below the working folder.
_ENVIRONMENTS = Path(".venvs")


@dataclass(frozen=True)
class Interpreter:
    """A Python that can import a framework."""

    executable: str
    prefix: Path
    """The folder of its environment."""


def interpreter_with(framework: str) -> Interpreter:
    """This interpreter if ``framework`` is installed here, else the one of its own environment.

    Raises :class:`LlmirError` if there is neither.
    """
    spec = util.find_spec(framework)
    if spec is not None and spec.origin is not None:  # a mere folder of that name has no origin
        return Interpreter(sys.executable, Path(sys.prefix))
    prefix = Path.cwd() / _ENVIRONMENTS / framework
    executable = prefix / "bin" / "python"
    if not executable.is_file():
        raise LlmirError(
            f"{framework} is not installed in {sys.prefix}, and there is no {_ENVIRONMENTS / framework} in this folder;"
            f" run: make {_ENVIRONMENTS / framework}"
        )
    return Interpreter(str(executable), prefix)
