"""Modules as text and as bytecode, both verified on the way in."""

from __future__ import annotations

import io
from pathlib import Path

from llmir.errors import LlmirError
from llmir.ir.attention import FusedAttention, find_kernel
from llmir.ir.bindings import ir
from llmir.ir.dialect import context as new_context
from llmir.ir.module import ops_of


class InvalidModuleError(LlmirError):
    """Text or bytecode is not a valid module; the message holds each error with its location."""


def parse(source: str | bytes, context: ir.Context | None = None) -> ir.Module:
    """A module from text or bytecode, in ``context`` (default: a new one; ``module.context`` keeps it alive).

    Raises InvalidModuleError with the location of each error.
    """
    try:
        with context or new_context():
            module = ir.Module.parse(source)
    except ir.MLIRError as error:
        raise InvalidModuleError(f"not a valid llm module: {describe(error)}") from error
    verify(module)
    return module


def read(path: Path, context: ir.Context | None = None) -> ir.Module:
    """A module from a file of text or bytecode.

    Raises InvalidModuleError, also for a file that cannot be read.
    """
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InvalidModuleError(f"cannot read module {path}: {error.strerror}") from error
    try:
        return parse(source if is_bytecode(source) else source.decode(), context)
    except UnicodeDecodeError as error:
        raise InvalidModuleError(f"{path} holds neither MLIR text nor MLIR bytecode") from error
    except InvalidModuleError as error:
        raise InvalidModuleError(f"{path}: {error}") from error.__cause__


def is_bytecode(source: bytes) -> bool:
    """Whether bytes begin as MLIR bytecode does."""
    return source[:4] == b"ML\xefR"


def print_module(module: ir.Module, *, locations: bool = False) -> str:
    """The module as text; with ``locations``, where each op came from."""
    return module.operation.get_asm(enable_debug_info=locations)


def bytecode(module: ir.Module) -> bytes:
    """The module as MLIR bytecode, locations included."""
    buffer = io.BytesIO()
    module.operation.write_bytecode(buffer)
    return buffer.getvalue()


def verify(module: ir.Module) -> None:
    """Raise InvalidModuleError, with the location of each error, where an invariant of an op or a symbol fails."""
    try:
        module.operation.verify()
    except ir.MLIRError as error:
        raise InvalidModuleError(f"not a valid llm module: {describe(error)}") from error
    for op in ops_of(module, FusedAttention):
        if op.kernel is not None and find_kernel(op, op.kernel.value) is None:
            raise InvalidModuleError(f"{where(op.location)}: kernel @{op.kernel.value} is not in the module")


def describe(error: ir.MLIRError) -> str:
    """The diagnostics of an MLIR error on one line: ``location: message; location: message``."""
    return "; ".join(f"{where(d.location)}: {d.message}" for d in error.error_diagnostics)


def where(location: ir.Location) -> str:
    """A location as a user reads it."""
    return str(location).removeprefix("loc(").removesuffix(")").replace('"', "")
