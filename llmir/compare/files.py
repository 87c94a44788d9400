"""Results are on disk whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmir.errors import LlmirError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path`` and put it in place only when it is complete.

    Makes missing folders. Raises :class:`LlmirError` where the file cannot be written; ``path`` then is as before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: matplotlib reads the file format off it.
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            write(partial)
            partial.chmod(0o666 & ~_umask())  # mkstemp files are private, results are for everybody
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise LlmirError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error


def write_json(path: Path, data: Any) -> None:
    """Write ``data`` as indented JSON, whole or not at all."""
    text = json.dumps(data, indent=1) + "\n"
    write_whole(path, lambda partial: _write_text(partial, text))


def write_folder(path: Path, files: Mapping[str, bytes]) -> None:
    """Fill a folder beside ``path`` with ``files`` by name, and put it in place only when it is complete.

    Makes missing folders; an empty one at ``path`` gives way. Raises :class:`LlmirError` where it cannot be written;
    ``path`` then is as before.
    """
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            for name, content in files.items():
                (partial / name).write_bytes(content)
            partial.chmod(0o777 & ~_umask())  # mkdtemp folders are private, results are for everybody
            partial.replace(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise LlmirError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another place"
        ) from error


def check_new_folder(path: Path) -> None:
    """Raise :class:`LlmirError` now rather than after a long run if a new folder cannot be put at ``path``."""
    try:
        if path.exists() and not path.is_dir():
            raise LlmirError(f"cannot write {path}: it is a file; name a folder")
        if path.is_dir() and any(path.iterdir()):
            raise LlmirError(f"cannot write {path}: it is not empty; name a new folder, or remove what is in it")
    except OSError as error:
        raise LlmirError(f"cannot write {path}: {error.strerror or error}; choose another place") from error
    _check_writable_beside(path.resolve())


def check_writable(path: Path) -> None:
    """Raise :class:`LlmirError` now rather than after a long run if a file cannot be put at ``path``."""
    if path.is_dir():
        raise LlmirError(f"cannot write {path}: it is a folder; name a file")
    _check_writable_beside(path)


def _check_writable_beside(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise LlmirError(f"cannot write {path}: {error.strerror or error}; choose another place") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
