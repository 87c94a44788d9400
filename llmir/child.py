"""Python programs that llmir starts: none of them imports what happens to lie in the working folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping

#: An option of Python. Without it, ``-m`` and ``-c`` put the working folder before the standard library: a file
#: queue.py or a checkout of the framework there would be imported, whoever wrote it.
SAFE_PATH = "-P"


def python(*arguments: str) -> list[str]:
    """The command that runs this interpreter with ``arguments``."""
    return [sys.executable, SAFE_PATH, *arguments]


def environment(own: Mapping[str, str]) -> dict[str, str]:
    """``own``, for a program that starts Python programs itself, as frameworks do: they import nothing from there."""
    return {**own, "PYTHONSAFEPATH": "1"}
