"""The attribute that stands for a model's parameter."""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from math import prod

from llmir.ir import types
from llmir.ir.base import LLMAttribute
from llmir.ir.bindings import ir
from llmir.ir.dtypes import DTYPES


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
    def stored_bytes(self) -> float:
        """Bytes of the elements on this rank."""
        return self.elements * DTYPES[self.element_type].bits / 8
