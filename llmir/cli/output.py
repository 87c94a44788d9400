"""Where a command's results go: to stdout or whole into a file or folder, with progress and remarks apart on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from llmir.compare.files import write_folder, write_whole

#: Progress and remarks; stdout is for what was asked for, so that it can be piped.
progress = Console(stderr=True, highlight=False)


def deliver(text: str, path: Path | None) -> None:
    """Writes a result to the file ``path``, whole or not at all, or to stdout where there is none."""
    if path is None:
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
    else:
        deliver_bytes(text.encode(), path)


def deliver_bytes(content: bytes, path: Path) -> None:
    """Writes a file whole or, raising LlmirError (a full disk included), not at all."""

    def fill(partial: Path) -> None:
        partial.write_bytes(content)

    write_whole(path, fill)
    progress.print(f"wrote {path}", soft_wrap=True)


def deliver_folder(files: dict[str, bytes], folder: Path) -> None:
    """Writes a folder of files by name, whole or, raising LlmirError, not at all."""
    write_folder(folder, files)
    progress.print(f"wrote {len(files)} files into {folder}", soft_wrap=True)
