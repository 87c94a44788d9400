"""Files of benchmarks/gpu.py, written whole or not at all, with the standard library alone."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmir.errors import LlmirError


def check_writable(path: Path) -> None:
    """Raise LlmirError now rather than after a long run if a file cannot be put at ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LlmirError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, and put it in place when it is complete."""
    partial = path.with_name(f".partial-{path.name}")  # the suffix stays last: matplotlib reads the format off it
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON."""
    text = json.dumps(data, indent=1) + "\n"

    def write(partial: Path) -> None:
        partial.write_text(text)

    write_whole(path, write)


def commit(checkout: Path) -> str | None:
    """The commit of a checkout, marked if files differ from it; None where git or its folder is not there."""
    found = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", "-C", str(checkout), *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        found.append(done.stdout.strip())
    return f"{found[0]} with uncommitted changes" if found[1] else found[0]
