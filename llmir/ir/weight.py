"""The attribute that stands for a model's parameter."""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from collections.abc import Iterator
from math import prod
from typing import Any

from llmir.ir import types
from llmir.ir.base import LLMAttribute
from llmir.ir.bindings import ir
from llmir.ir.dtypes import DTYPES
from llmir.ir.module import operation
from llmir.ir.quant_scheme import QuantScheme


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

    @property
    def elements(self) -> int:
        """Elements on this rank; an extent that is not known counts as nothing."""
        return prod(size or 0 for size in self.shape)

    @property
    def whole_elements(self) -> int:
        """Elements of the whole tensor, the shards of all ranks together; an unknown extent counts as nothing."""
        kind = self.type.tensor if isinstance(self.type, types.ShardedTensor) else self.type
        return prod(size or 0 for size in types.local_shape(kind))

    @property
    def scheme(self) -> QuantScheme | None:
        """How it is quantized; None where it is not."""
        return types.scheme_of(self.type)

    @property
    def stored_bytes(self) -> float:
        """Bytes of the elements on this rank; of a quantized one its scales and zero points too."""
        if self.scheme is not None:
            return self.scheme.stored_bytes([size or 0 for size in self.shape])
        return self.elements * DTYPES[self.element_type].bits / 8


def weights_of(module: Any) -> dict[str, Weight]:
    """Every weight of a module by its name; one that several ops read, as tied embeddings do, stands once."""
    found: dict[str, Weight] = {}

    def visit(op: ir.Operation) -> ir.WalkResult:
        found.update((weight.name, weight) for weight in _weights_in(list(op.attributes.values())))
        return ir.WalkResult.ADVANCE

    operation(module).walk(visit, ir.WalkOrder.PRE_ORDER)
    return found


def _weights_in(attributes: list[ir.Attribute]) -> Iterator[Weight]:
    for attribute in attributes:
        if isinstance(attribute, Weight):
            yield attribute
        elif isinstance(attribute, ir.ArrayAttr):
            yield from _weights_in(list(attribute))
