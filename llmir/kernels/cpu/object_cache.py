"""Compiled kernel objects on disk, each under a key that names everything that decides its code.

An entry is one file ``<key>.o``: a header (magic, key, length, checksum) and the object. What goes wrong with a file
is noticed by the header, and the entry is built again; one that another user may have written is not read
(:mod:`llmir.cache`), since anybody can make a header. A process that only loads kernels needs neither MLIR nor torch
here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

from llmir.cache import KeptFolder, UntrustedError, UntrustedFolderError
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.build_lock import build_lock
from llmir.kernels.source_digest import closure_digest

logger = logging.getLogger(__name__)

_MAGIC = b"LLMIROBJ"
_FORMAT = 1
_HEADER = struct.Struct("<8sI32sQ32s")  # magic, format, key, object bytes, sha256 of the object

#: The module that writes the objects: what it imports decides their code. Named, because it is not to be imported here.
GENERATOR = "llmir.kernels.cpu.lowering"

#: Import name and distribution name of the MLIR bindings, in the order llmir.ir.bindings looks for them.
_BINDINGS = (("torch_mlir", "torch-mlir"), ("mlir", "mlir"))


def object_key(spec: KernelSpec) -> str:
    """The cache key of ``spec``: 64 hexadecimal digits.

    Hashes the spec, which names the instruction set, the sources of the generator and of all it imports, and the MLIR
    bindings' name and version. The machine is not in it: an instruction set's code is the same wherever it is made.
    Raises KernelError where llmir is installed without its sources.
    """
    parts = {"spec": spec.to_json(), "generators": closure_digest(GENERATOR), "bindings": bindings_version()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def bindings_version() -> str:
    """Name and version of the installed MLIR bindings, found without importing them; "none" without any.

    Of both where both are installed: which one compiles shows only when the first is imported, and may be broken.
    """
    installed = [pair for pair in _BINDINGS if importlib.util.find_spec(pair[0]) is not None]
    return ", ".join(_described(*pair) for pair in installed) or "none"


def _described(module: str, distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:  # a build tree on the path, without metadata
        return f"{module} of unknown version"


class ObjectCache:
    """The objects in one folder, which is made when the first one is stored; ``suffix`` ends their file names.

    A folder that cannot be written to, or that others can write to, costs one warning: objects are then built and not
    kept.
    """

    def __init__(self, folder: Path | str, suffix: str = ".o"):
        self.folder = Path(folder)
        self._entries = KeptFolder(self.folder)
        self.suffix = suffix
        self._warned = False

    def get_or_build(self, key: str, build: Callable[[], bytes]) -> bytes:
        """The object stored under ``key`` (as :func:`object_key` makes it), or ``build()``, stored for next time.

        Of several processes or threads that want the same key, one builds while the others wait for its entry. What
        ``build`` raises is passed on, nothing is stored, and the next one may build. A build may ask for other keys;
        LlmirError is raised where it asks for its own.
        """
        data = self._read(key)
        if data is not None:
            return data
        with build_lock(self._entries, key) as why_not:
            if why_not is not None:
                self._warn(why_not)
                return build()
            data = self._read(key, level=logging.DEBUG)  # built by another process while this one waited?
            if data is None:
                data = build()
                self._store(key, data)
            return data

    def _read(self, key: str, level: int = logging.WARNING) -> bytes | None:
        """The stored object; None if there is none that can be trusted, and why in the log at ``level``."""
        name = f"{key}{self.suffix}"
        path = self.folder / name
        try:
            entry = self._entries.read(name)
        except UntrustedFolderError as error:
            self._warn(error)
            return None
        except UntrustedError as error:
            logger.log(level, "A cached object is made again: %s.", error)
            return None
        except OSError as error:
            logger.log(level, "The cached object %s cannot be read (%s) and is made again.", path, error.strerror)
            return None
        if entry is None:
            return None
        fault = _fault(key, entry)
        if fault is not None:
            logger.log(level, "The cached object %s %s and is made again.", path, fault)
            return None
        return entry[_HEADER.size :]

    def _store(self, key: str, data: bytes) -> None:
        """Put an entry in its place as a whole."""
        try:
            self._entries.write(f"{key}{self.suffix}", _header(key, data) + data)
        except (OSError, UntrustedError) as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        if isinstance(error, UntrustedError | TimeoutError):  # which say what to do
            logger.warning("%s. Until then compiled kernels and measurements are made anew each time.", error)
        else:
            logger.warning(
                "Compiled kernels and measurements cannot be kept in %s (%s): they are made anew each time. "
                "Free space there, or point LLMIR_CACHE at a folder that can be written to.",
                self.folder,
                getattr(error, "strerror", None) or error,
            )


def _header(key: str, data: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, _FORMAT, bytes.fromhex(key), len(data), hashlib.sha256(data).digest())


def _fault(key: str, entry: bytes) -> str | None:
    """What is wrong with an entry read from disk, as a verb phrase; None if nothing is."""
    if len(entry) < _HEADER.size or not entry.startswith(_MAGIC):
        return "is not a cached object of llmir"
    _, version, stored_key, size, checksum = _HEADER.unpack_from(entry)
    data = entry[_HEADER.size :]
    if version != _FORMAT:
        return f"has format {version} instead of {_FORMAT}"
    if stored_key != bytes.fromhex(key):
        return "belongs to another key"
    if len(data) != size:
        return f"has {len(data)} bytes instead of {size}"
    if hashlib.sha256(data).digest() != checksum:
        return "is corrupt"
    return None
