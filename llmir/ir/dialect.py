"""The ``llm`` dialect as a whole: importing this file knows all its types, attributes and ops."""

from __future__ import annotations

from llmir.ir import attention, attributes, experts, opaque, ops, types  # noqa: F401  (defining a class adds it to the dialect)
from llmir.ir.base import LLM
from llmir.ir.bindings import ir


def load(context: ir.Context) -> None:
    """Make ``llm`` known to a context; a second call does nothing."""
    if not context.is_dialect_loaded(LLM.DIALECT_NAMESPACE):
        with context:
            LLM.load()


def context() -> ir.Context:
    """A new context that knows ``llm``, to be used as ``with context(), ir.Location.unknown():``.

    One thread: the modules are small, and the verifiers are Python.
    """
    new = ir.Context()
    new.enable_multithreading(False)
    load(new)
    return new
