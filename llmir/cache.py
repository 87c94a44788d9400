"""Folders of what llmir keeps on disk: kernels, plans, measurements. What another user may have written is not used.

An object that is loaded runs in the server, and a plan says what is loaded, so whoever can write them runs code there.
Trusted are a folder and an entry that belong to this process's user, or to root, and that nobody else may write.
That is asked of the folder that entries lie in, not of those above it, which a container may have to share with others:
who may write there can take the folder away, but can put none in its place that belongs to this user. Every access goes
through a descriptor of the folder that was looked at, and follows no link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from llmir.errors import LlmirError

#: The folders of llmir's cache folder: kernels, plans, measurements of machines, which dtypes frameworks serve fastest,
#: and what Triton keeps.
OBJECTS, PLANS, MEASUREMENTS, DTYPE_CHOICES, TRITON = FOLDERS = ("objects", "plans", "measurements", "dtypes", "triton")
#: Days after its last use that an entry is kept: models that are served now and then stay, a release's sources do not.
KEPT_DAYS = 90.0
#: Days that a lock, or a file that was never finished, is left alone: longer than any build.
_LEFTOVER_DAYS = 1.0
_DAY = 86400.0
#: How the name of a file ends that is being written.
UNFINISHED = ".part"
_PRIVATE_FOLDER, _PRIVATE_FILE = 0o700, 0o600
_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC
_ROOT = 0


class UntrustedError(LlmirError):
    """An entry of a folder may be another user's work."""


class UntrustedFolderError(UntrustedError):
    """All entries of a folder may be another user's work."""


class KeptFolder:
    """One folder of entries, each a file that is there as a whole or not at all; made when the first one is written."""

    def __init__(self, path: Path | str):
        self.path = Path(path)

    def read(self, name: str) -> bytes | None:
        """The entry ``name``, None where there is none.

        Raises OSError where it cannot be read, UntrustedError where another user may have written it.
        """
        try:
            with self.opened() as folder, self._entry(folder, name, os.O_RDONLY) as file:
                with contextlib.suppress(OSError):  # a folder that only root may write
                    os.utime(file)  # when it was used last
                return _contents(file)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, name: str, data: bytes) -> None:
        """Put an entry in its place, as a whole or not at all; raises OSError or UntrustedFolderError."""
        with self.opened(make=True) as folder:
            unfinished = f".{name}.{secrets.token_hex(8)}{UNFINISHED}"
            file = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, _PRIVATE_FILE, dir_fd=folder)
            try:
                with os.fdopen(file, "wb") as stream:
                    stream.write(data)
                os.replace(unfinished, name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(unfinished, dir_fd=folder)
                raise

    def open_lock(self, name: str) -> int:
        """A descriptor of the file ``name``, made if missing; raises OSError or UntrustedError."""
        with self.opened(make=True) as folder, self._entry(folder, name, os.O_RDWR | os.O_CREAT) as file:
            return os.dup(file)

    def size(self) -> tuple[int, int]:
        """How many entries there are, and their bytes; raises OSError or UntrustedFolderError."""
        try:
            with self.opened() as folder:
                sizes = [_bytes(folder, name) for name in os.listdir(folder) if not _is_leftover(name)]
        except FileNotFoundError:
            return 0, 0
        return len(sizes), sum(sizes)

    def prune(self, days: float = KEPT_DAYS) -> int:
        """Remove what was not used for so many days, and what was left over; returns how many entries that were.

        Raises OSError or UntrustedFolderError.
        """
        removed, now = 0, time.time()
        try:
            with self.opened() as folder:
                for name in os.listdir(folder):
                    age = (now - os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime) / _DAY
                    leftover = _is_leftover(name)
                    if age >= (min(days, _LEFTOVER_DAYS) if leftover else days):
                        _remove(folder, name)
                        removed += not leftover
        except FileNotFoundError:  # nothing was kept yet, or another process removes the same
            pass
        return removed

    def made(self) -> Path:
        """The folder's path, for a program that keeps files of its own there, which nobody else may enter from now on.

        Raises OSError or UntrustedFolderError.
        """
        with self.opened(make=True) as folder:
            if os.fstat(folder).st_uid == os.geteuid():
                os.fchmod(folder, _PRIVATE_FOLDER)
        return self.path

    @contextlib.contextmanager
    def opened(self, *, make: bool = False) -> Iterator[int]:
        """A descriptor of the folder, which is trusted; raises OSError or UntrustedFolderError.

        ``make``: whether a missing folder is made, for this user alone.
        """
        if self.path.is_symlink():
            raise UntrustedFolderError(
                f"{self.path} is a symbolic link, which llmir does not follow in its cache: remove it, or set "
                f"LLMIR_CACHE to a folder on the other file system"
            )
        if make:
            _make(self.path)
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK)
        try:
            if fault := _fault(self.path, os.fstat(folder)):
                raise UntrustedFolderError(fault)
            yield folder
        finally:
            os.close(folder)

    @contextlib.contextmanager
    def _entry(self, folder: int, name: str, flags: int) -> Iterator[int]:
        """A descriptor of an entry that is trusted."""
        path = self.path / name
        try:
            # What is no file, such as a pipe, must not let the server wait.
            file = os.open(name, flags | _NO_LINK | os.O_NONBLOCK, _PRIVATE_FILE, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise UntrustedError(f"{path} is a symbolic link, which llmir does not follow: remove it") from None
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise UntrustedError(f"{path} is not a file: remove it")
            if fault := _fault(path, status):
                raise UntrustedError(fault)
            yield file
        finally:
            os.close(file)


def _is_leftover(name: str) -> bool:
    """Whether a file is none that is read: a lock, or one that a process was ended over."""
    return name.startswith(".") or name.endswith((UNFINISHED, ".lock"))


def _bytes(folder: int, name: str) -> int:
    """Size of an entry, of a folder that another program made with all that is in it."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        return status.st_size
    walk = os.fwalk(name, dir_fd=folder)
    return sum(os.stat(file, dir_fd=at, follow_symlinks=False).st_size for _, _, files, at in walk for file in files)


def _remove(folder: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=folder)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=folder)


def _make(folder: Path) -> None:
    """Make a folder and those above it that are missing, each for this user alone."""
    if not folder.parent.exists():
        _make(folder.parent)
    folder.mkdir(_PRIVATE_FOLDER, exist_ok=True)


def _contents(file: int) -> bytes:
    with os.fdopen(os.dup(file), "rb") as stream:
        return stream.read()


def _fault(path: Path, status: os.stat_result) -> str | None:
    """Why what lies at ``path`` is not trusted, and what to do; None where it is."""
    user = os.geteuid()
    if status.st_uid not in (user, _ROOT):
        return (
            f"{path} belongs to {_name(status.st_uid)}, and this process runs as {_name(user)}, which uses nothing "
            f"that another user can write: run it as that user (docker run --user {status.st_uid}:{status.st_gid}), or "
            f"set LLMIR_CACHE to a folder that {_name(user)} alone uses"
        )
    if status.st_mode & _BY_OTHERS:
        return (
            f"{path} can be written by others than {_name(status.st_uid)}, to whom it belongs (mode "
            f"{stat.S_IMODE(status.st_mode):04o}), so it is not used: remove it, or if nobody else wrote there, run: "
            f"chmod -R go-w {path}"
        )
    return None


def _name(user: int) -> str:
    """A user's name and number."""
    try:
        return f"{pwd.getpwuid(user).pw_name} (uid {user})"
    except KeyError:  # usual in containers
        return f"uid {user}"
