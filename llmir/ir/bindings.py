"""The MLIR Python bindings, resolved in one place; every other file takes them from here.

Two packages carry the same upstream bindings: ``torch-mlir`` (module ``torch_mlir``) and LLVM's own wheels
(module ``mlir``). Which one is installed makes no difference to the rest of llmir.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING

from llmir.errors import MissingBindingsError

if TYPE_CHECKING:
    from torch_mlir import execution_engine, ir, passmanager, rewrite
    from torch_mlir.dialects import arith, cf, ext, func, llvm, math, memref, scf, vector, x86
else:
    _CANDIDATES = (("torch_mlir", "torch-mlir"), ("mlir", "mlir"))
    _MODULES = ("ir", "passmanager", "rewrite", "execution_engine")
    _DIALECTS = ("arith", "cf", "ext", "func", "llvm", "math", "memref", "scf", "vector", "x86")

    def _resolve() -> tuple[str, str]:
        """The module name of the first bindings that import, and the distribution that carries them."""
        problems = []
        for module, distribution in _CANDIDATES:
            try:
                importlib.import_module(f"{module}.dialects.ext")
            except ImportError as error:
                problems.append(f"{module}: {error}")
            else:
                return module, distribution
        raise MissingBindingsError(
            f"no MLIR Python bindings can be imported ({'; '.join(problems)}); "
            "install them with: pip install torch-mlir"
        )

    _package, NAME = _resolve()
    for _module in _MODULES:
        globals()[_module] = importlib.import_module(f"{_package}.{_module}")
    for _dialect in _DIALECTS:
        globals()[_dialect] = importlib.import_module(f"{_package}.dialects.{_dialect}")


def _version(distribution: str) -> str:
    """Installed version of ``distribution``, or ``unknown`` where its metadata is missing (a source build)."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


if TYPE_CHECKING:
    NAME: str = ""
VERSION: str = _version(NAME)

__all__ = [
    "NAME",
    "VERSION",
    "arith",
    "cf",
    "execution_engine",
    "ext",
    "func",
    "ir",
    "llvm",
    "math",
    "memref",
    "passmanager",
    "rewrite",
    "scf",
    "vector",
    "x86",
]
