"""Attributes of the ``llm`` dialect, and the way between Python values and MLIR attributes."""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from llmir.ir import types
from llmir.ir.base import LLMAttribute
from llmir.ir.bindings import ir
from llmir.ir.signature import SharingCosts, StepPolicy, Variants, variants_of


def to_attribute(value: Any) -> ir.Attribute:
    """A bool, int, float, string, list or dictionary (of these) as an attribute; TypeError for anything else.

    Integers become ``i64``, floats ``f64``: both come back unchanged. Dictionary keys must be strings, and
    come back in alphabetical order.
    """
    if isinstance(value, ir.Attribute):
        return value
    if isinstance(value, bool):
        return ir.BoolAttr.get(value)
    if isinstance(value, str):
        return ir.StringAttr.get(value)
    if isinstance(value, numbers.Integral):
        return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), int(value))
    if isinstance(value, numbers.Real):
        return ir.FloatAttr.get(ir.F64Type.get(), float(value), loc=ir.Location.unknown())
    if isinstance(value, Mapping):
        return ir.DictAttr.get({key: to_attribute(item) for key, item in value.items()})
    if isinstance(value, Sequence):
        return ir.ArrayAttr.get([to_attribute(item) for item in value])
    if value is None:
        return ir.UnitAttr.get()
    raise TypeError(f"{type(value).__name__} has no attribute: {value!r}")


def to_python(attribute: ir.Attribute) -> Any:
    """The inverse of :func:`to_attribute`; an attribute of another kind raises TypeError."""
    if isinstance(attribute, ir.BoolAttr | ir.StringAttr | ir.IntegerAttr | ir.FloatAttr):
        return attribute.value
    if isinstance(attribute, ir.DictAttr):
        return {item.name: to_python(item.attr) for item in attribute}
    if isinstance(attribute, ir.ArrayAttr):
        return [to_python(item) for item in attribute]
    if isinstance(attribute, ir.UnitAttr):
        return None
    raise TypeError(f"{attribute} has no Python value")


class Weight(LLMAttribute, name="weight"):
    """A parameter by name and type, never its data: ``#llm.weight<"model.norm.weight", tensor<576xbf16>>``."""

    symbol: ir.StringAttr
    kind: ir.TypeAttr

    @classmethod
    def build(cls, name: str, type: ir.Type) -> "Weight":
        """``type`` is a tensor, a ShardedTensor or a QuantizedTensor."""
        return cls.get(ir.StringAttr.get(name), types.checked(type))

    @property
    def name(self) -> str:
        """The framework's name of the parameter."""
        return self.symbol.value

    @property
    def type(self) -> ir.Type:
        """The parameter's type."""
        return self.kind.value

    @property
    def shape(self) -> list[int | None]:
        """Shape as it lies on this rank."""
        return types.local_shape(self.type)

    @property
    def element_type(self) -> str:
        """Name of the stored element type."""
        return types.element_name(self.type)


class Selection(LLMAttribute, name="selection"):
    """What kernel selection decided for an attention op: instruction set, variants, run-time conditions."""

    instruction_set: ir.StringAttr
    tiles: ir.ArrayAttr
    conditions: ir.DictAttr

    @classmethod
    def build(cls, *, isa: str, variants: Variants, policy: StepPolicy) -> "Selection":
        """The attribute for these records."""
        return cls.get(
            ir.StringAttr.get(isa),
            to_attribute([asdict(variant) for variant in variants]),
            to_attribute(asdict(policy)),
        )

    @property
    def isa(self) -> str:
        """Instruction set the kernel is made for."""
        return self.instruction_set.value

    @property
    def variants(self) -> Variants:
        """Tile sizes of each variant; TypeError where the attribute does not hold them."""
        return variants_of(to_python(self.tiles))

    @property
    def policy(self) -> StepPolicy:
        """Run-time conditions; TypeError where the attribute does not hold them."""
        policy = StepPolicy(**to_python(self.conditions))
        return policy if policy.sharing is None else replace(policy, sharing=_sharing_costs(policy.sharing))


def _sharing_costs(record: Any) -> SharingCosts:
    """The record that a dictionary holds; its points come as lists."""
    costs = SharingCosts(**record)
    points: Any = costs.cached_key
    return replace(costs, cached_key=tuple((tokens, time) for tokens, time in points))
