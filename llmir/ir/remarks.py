"""What passes decided, and why, kept in the module itself: it survives printing and bytecode."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llmir.ir.attributes import to_attribute, to_python
from llmir.ir.bindings import ir

ATTRIBUTE = "llm.remarks"


@dataclass(frozen=True)
class Remark:
    """One decision of one pass."""

    pass_name: str
    subject: str
    """What was decided about: a layer, a kernel, the whole cache."""
    decision: str
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)
    """The figures behind it, the unit in the name: ``{"read_gb_per_s": 14.2}``."""
    alternatives: list[dict[str, Any]] = field(default_factory=list)
    """What else was considered, each with its own figures."""


def of_layers(layers: Sequence[str]) -> str:
    """The subject of a remark about layers that are decided alike, in the order of the module."""
    return layers[0] if len(layers) == 1 else f"{len(layers)} layers ({layers[0]} to {layers[-1]})"


def add_remark(module: Any, remark: Remark) -> None:
    """Append a remark to a module (ir.Module, or its operation in a pass)."""
    operation = module.operation
    with operation.context:
        earlier = list(operation.attributes[ATTRIBUTE]) if ATTRIBUTE in operation.attributes else []
        operation.attributes[ATTRIBUTE] = ir.ArrayAttr.get([*earlier, to_attribute(asdict(remark))])


def remarks(module: Any) -> list[Remark]:
    """The remarks of a module, in the order they were made."""
    operation = module.operation
    if ATTRIBUTE not in operation.attributes:
        return []
    return [Remark(**to_python(entry)) for entry in operation.attributes[ATTRIBUTE]]
