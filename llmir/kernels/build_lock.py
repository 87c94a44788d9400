"""One builder at a time: the lock under which an entry of a cache on disk is made."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Iterator

from llmir.cache import KeptFolder, UntrustedError
from llmir.errors import LlmirError

#: Seconds to wait for another's build, several times what the longest takes; then this one builds too.
PATIENCE = 600.0
_POLL_SECONDS = 0.05
_MOST_NOTE_BYTES = 512


class _Builds(threading.local):
    """What the current thread is building, by folder and name of the locks."""

    def __init__(self) -> None:
        self.locks: set[tuple[str, str]] = set()


_builds = _Builds()


@contextlib.contextmanager
def build_lock(folder: KeptFolder, key: str) -> Iterator[Exception | None]:
    """Hold the lock of the entry ``key`` inside the ``with``; free again after it, however it ends.

    Gives None, or where there is no lock the reason: the folder cannot be written to or is not trusted, the file system
    has no locks, or :data:`PATIENCE` is over. The caller then builds without keeping. Another process, or
    another thread, that wants the lock waits. Raises LlmirError where this thread is inside the same ``with`` already:
    a build that asks for its own result would wait for itself.
    """
    own = (os.path.realpath(folder.path), key)
    if own in _builds.locks:
        raise LlmirError(f"building {key} in {folder.path} asks for its own result: this is a fault of llmir")
    _builds.locks.add(own)
    try:
        lock, why_not = _acquired(folder, f"{key}.lock")
        try:
            yield why_not
        finally:
            if lock is not None:
                _release(lock)
    finally:
        _builds.locks.discard(own)


def _acquired(folder: KeptFolder, name: str) -> tuple[int | None, Exception | None]:
    """A descriptor of the lock, acquired, or why there is none.

    Not an exception handler around the build: what the build raises would be told as a consequence of the lock's error.
    A descriptor and no object: nothing is freed because something else is collected, or kept because an error is.
    """
    try:
        lock = folder.open_lock(name)
    except (OSError, UntrustedError) as error:
        return None, error
    try:
        _wait(lock)
    except BlockingIOError:
        why_not: OSError = TimeoutError(
            f"waited {PATIENCE:.0f} s for {folder.path / name}, which {_holder(lock)} holds: end that if it hangs"
        )
    except OSError as error:  # a file system without locks
        why_not = error
    else:
        return lock, None
    os.close(lock)
    return None, why_not


def _wait(lock: int) -> None:
    """Take the lock and leave a note in it of who holds it; BlockingIOError where it is not free in time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_POLL_SECONDS)
    with contextlib.suppress(OSError):  # a full disk
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)


def _holder(lock: int) -> str:
    return os.pread(lock, _MOST_NOTE_BYTES, 0).decode(errors="replace") or "another process"


def _release(lock: int) -> None:
    """Free the lock, also where a child process has inherited the descriptor."""
    # A system that cannot unlock must not hide what the build raised; closing the file unlocks too.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)
