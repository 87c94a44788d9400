"""Child processes of tests: fresh interpreters, and none where none may be started."""

import os
import subprocess
import sys
from typing import Any, NoReturn


def run(code: str, *arguments: str, **environment: str) -> str:
    """Standard output of a fresh interpreter."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def no_child(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands where a child process would be started."""
    raise AssertionError("a child process was started")
