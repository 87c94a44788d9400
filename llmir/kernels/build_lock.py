"""One builder at a time: the lock under which an entry of a cache on disk is made."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from llmir.errors import LlmirError

#: Wait for another process's build as long as it takes.
NO_LIMIT = -1.0


class _Builds(threading.local):
    """What the current thread is building, by the paths of the locks."""

    def __init__(self) -> None:
        self.paths: set[str] = set()


_builds = _Builds()


@contextlib.contextmanager
def build_lock(path: Path, timeout: float = NO_LIMIT) -> Iterator[Exception | None]:
    """Hold the lock file ``path`` inside the ``with``; free again after it, however it ends.

    Gives None, or where there is no lock the reason: the folder cannot be written to, the file system has no locks, or
    ``timeout`` seconds have passed. The caller then builds without keeping. Another process, or another thread, that
    wants the lock waits. Raises LlmirError where this thread is inside the same ``with`` already: a build that asks for
    its own result would wait for itself.
    """
    own = os.path.realpath(path)
    if own in _builds.paths:
        raise LlmirError(f"building {path.stem} in {path.parent} asks for its own result: this is a fault of llmir")
    _builds.paths.add(own)
    try:
        lock, why_not = _acquired(path, timeout)
        try:
            yield why_not
        finally:
            if lock is not None:
                # A system that cannot unlock must not hide what the build raised; closing the file unlocks too.
                with contextlib.suppress(OSError):
                    lock.release()
    finally:
        _builds.paths.discard(own)


def _acquired(path: Path, timeout: float) -> tuple[FileLock | None, Exception | None]:
    """The lock, acquired once, or why there is none.

    Not an exception handler around the build: what the build raises would be told as a consequence of the lock's error.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=timeout)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # the latter: a file system without locks; a timeout is an OSError
        return None, error
    return lock, None
