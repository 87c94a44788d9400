"""The errors a user can meet: each says what happened, where, and what to do about it."""

from __future__ import annotations


class LlmirError(Exception):
    """Base of every error llmir raises for a user; ``str(error)`` is one sentence to act on."""


class UnsupportedLayerError(LlmirError):
    """A model layer has no llmir operation or no llmir kernel."""

    def __init__(self, layer: str, reason: str):
        super().__init__(f"llmir cannot serve layer {layer!r}: {reason}")
        self.layer = layer
        self.reason = reason

    def __reduce__(self):  # two-argument constructors do not pickle by themselves
        return type(self), (self.layer, self.reason)


class MissingBindingsError(LlmirError):
    """No MLIR Python bindings are installed."""


class KernelError(LlmirError):
    """A kernel cannot be generated, compiled or loaded."""


class PlanError(LlmirError):
    """A plan cannot be read, or was made for something else."""
