"""Which IR value each tensor of a watched forward pass holds, while in-place operations change what tensors hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmir.ir.bindings import ir


@dataclass(frozen=True)
class _Known:
    value: ir.Value
    writes: int
    """How many writes to its memory the value includes."""


class Values:
    """IR values by tensor.

    Tensors that share memory, such as a view and what it is a view of, are told by their storage: a write through one
    of them makes the values of the others stale, see :meth:`find`.
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}
        self._writes: dict[int, list[ir.Value]] = {}
        # Tensors are told apart by their id, which Python gives to the next one when a tensor dies: none may.
        self._alive: list[torch.Tensor] = []

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self._known or _storage(tensor) in self._writes

    def find(self, tensor: torch.Tensor) -> tuple[ir.Value | None, list[ir.Value]]:
        """The value last set for a tensor, None if there is none, and what was written to its memory since."""
        known = self._known.get(id(tensor))
        writes = self._writes.get(_storage(tensor), [])
        return (None, writes) if known is None else (known.value, writes[known.writes :])

    def set(self, tensor: torch.Tensor, value: ir.Value) -> None:
        """A tensor holds this value, as an operation gave it."""
        self._known[id(tensor)] = _Known(value, len(self._writes.get(_storage(tensor), [])))
        self._alive.append(tensor)

    def write(self, tensor: torch.Tensor, value: ir.Value) -> None:
        """A tensor was changed in place, and so were all that share its memory."""
        self._writes.setdefault(_storage(tensor), []).append(value)
        self.set(tensor, value)

    def snapshot(self) -> tuple[dict[int, _Known], dict[int, list[ir.Value]]]:
        """What :meth:`restore` takes."""
        return dict(self._known), {storage: list(values) for storage, values in self._writes.items()}

    def restore(self, snapshot: tuple[dict[int, _Known], dict[int, list[ir.Value]]]) -> None:
        """Forget what was set since the snapshot."""
        self._known, self._writes = snapshot


def _storage(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata
