"""Which Python runs a framework: frameworks that cannot live in one environment have one each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

from llmir.child import SAFE_PATH
from llmir.errors import LlmirError

_PRINT_VERSIONS = """
import json, sys
from llmir.compare.machine import versions
print(json.dumps(versions(sys.argv[1:])))
"""
#: Seconds for a program that imports torch at most and multiplies a few matrices.
_PATIENCE = 300.0
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


def versions_with(interpreter: Interpreter, packages: Sequence[str]) -> dict[str, str]:
    """:func:`llmir.compare.machine.versions` in the environment of another interpreter; imports no framework.

    Raises :class:`LlmirError` if llmir cannot be imported there.
    """
    return _run(interpreter, ["-c", _PRINT_VERSIONS, *packages], None)


def product_seconds(interpreter: Interpreter, environment: Mapping[str, str]) -> dict[str, float]:
    """Seconds of a matrix product by dtype, see :mod:`llmir.compare.products`.

    Raises :class:`LlmirError` if torch or llmir cannot be imported there.
    """
    return _run(interpreter, ["-m", "llmir.compare.products"], environment)


def _run(interpreter: Interpreter, arguments: Sequence[str], environment: Mapping[str, str] | None) -> Any:
    """What a program of llmir prints, which is JSON; no environment: this process's."""
    command = [interpreter.executable, SAFE_PATH, *arguments]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LlmirError(
            f"{interpreter.executable} did not answer within {_PATIENCE:.0f} s: try again on an idle machine"
        ) from error
    if done.returncode:
        cause = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise LlmirError(f"{interpreter.executable} cannot run llmir: {cause}; install llmir there")
    return json.loads(done.stdout)
