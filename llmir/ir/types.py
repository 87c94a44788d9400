"""The types of the ``llm`` dialect, each with a builder and readers in Python values.

=========================================================================================  ==================
``!llm.paged_kv_cache<#llm.cache_format<{...}>, max_length>``                               PagedKVCache
``!llm.sharded_tensor<tensor<..>, dim, shards, index>``                                     ShardedTensor
``!llm.quantized_tensor<#llm.quant_scheme<{...}>, [shape]>``                                QuantizedTensor
=========================================================================================  ==================

A type read from text can be out of its invariants: MLIR has no hook for a type's verifier in Python.
Builders raise ValueError, and every op that uses the type repeats the check with the op's location.
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from collections.abc import Sequence
from typing import TypeVar

from llmir.ir.attributes import CacheFormatAttr, QuantSchemeAttr
from llmir.ir.base import LLMType
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.dtypes import DTYPES
from llmir.ir.quant_scheme import QuantScheme

_T = TypeVar("_T", bound=ir.Type)


def element(name: str) -> ir.Type:
    """The MLIR type called ``name`` (``bf16``, ``f32``, ``i64`` ...); ValueError for another name."""
    if name not in DTYPES:
        raise ValueError(f"unknown element type {name!r}; known are {', '.join(DTYPES)}")
    return ir.Type.parse(name)


def tensor(shape: Sequence[int | None], element_type: str) -> ir.RankedTensorType:
    """A tensor type; None in ``shape`` is a dimension known only when it runs."""
    dynamic = ir.ShapedType.get_dynamic_size()
    return ir.RankedTensorType.get([dynamic if size is None else size for size in shape], element(element_type))


def _integer(value: int) -> ir.IntegerAttr:
    return ir.IntegerAttr.get(ir.IntegerType.get_signless(64), value)


def _integers(values: Sequence[int]) -> ir.ArrayAttr:
    return ir.ArrayAttr.get([_integer(value) for value in values])


def _are_i64(attributes: Sequence[ir.Attribute]) -> bool:
    """``64 : index`` and ``64`` are different attributes, so a type built from either would not be equal."""
    return all(isinstance(a, ir.IntegerAttr) and str(a.type) == "i64" for a in attributes)


class PagedKVCache(LLMType, name="paged_kv_cache"):
    """One layer's KV cache on one rank, in blocks (vLLM's word; SGLang's page)."""

    described: CacheFormatAttr
    longest: ir.IntegerAttr

    @classmethod
    def build(cls, format: CacheFormat, *, max_length: int) -> "PagedKVCache":
        """The type; ``max_length`` is in tokens. ValueError where an invariant fails."""
        return checked(cls.get(CacheFormatAttr.build(format), _integer(max_length)))

    @property
    def format(self) -> CacheFormat:
        """How the cache lies in memory; TypeError where the type does not say it."""
        return self.described.record

    @property
    def max_length(self) -> int:
        """Longest sequence, in tokens."""
        return self.longest.value

    def problem(self) -> str | None:
        """The invariant that does not hold, in words."""
        if not isinstance(self.described, CacheFormatAttr) or not _are_i64([self.longest]):
            return f"a KV cache has a format and a maximum length of i64, not {self}"
        if self.max_length <= 0:
            return f"max_length of a KV cache must be positive, not {self.max_length}"
        try:
            return self.format.problem()
        except TypeError as error:
            return str(error)


class ShardedTensor(LLMType, name="sharded_tensor"):
    """One rank's part of a tensor that is cut into equal shards along one dimension."""

    whole: ir.TypeAttr
    cut: ir.IntegerAttr
    parts: ir.IntegerAttr
    part: ir.IntegerAttr

    @classmethod
    def build(cls, tensor: ir.Type, *, dim: int, shards: int, index: int) -> "ShardedTensor":
        """Shard ``index`` of ``shards`` of the whole ``tensor``. ValueError where an invariant fails."""
        return checked(cls.get(tensor, _integer(dim), _integer(shards), _integer(index)))

    @property
    def tensor(self) -> ir.Type:
        """The whole tensor's type."""
        return self.whole.value

    @property
    def dim(self) -> int:
        """The dimension that is cut."""
        return self.cut.value

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self.parts.value

    @property
    def index(self) -> int:
        """Which shard this one is."""
        return self.part.value

    @property
    def shape(self) -> list[int | None]:
        """Shape of this shard."""
        whole = local_shape(self.tensor)
        extent = whole[self.dim]
        whole[self.dim] = None if extent is None else extent // self.shards
        return whole

    def problem(self) -> str | None:
        """The invariant that does not hold, in words."""
        if not _are_i64([self.cut, self.parts, self.part]):
            return f"dimension, shards and index of a sharded tensor are i64, not {self}"
        if isinstance(self.tensor, ShardedTensor):
            return "a sharded tensor cannot be sharded again"
        if not is_weight(self.tensor):
            return f"a sharded tensor is cut from a tensor, not from {self.tensor}"
        inner = problem(self.tensor)
        if inner is not None:
            return inner
        whole = local_shape(self.tensor)
        if not 0 <= self.dim < len(whole):
            return f"dimension {self.dim} of {self.tensor} does not exist"
        if self.shards <= 0 or not 0 <= self.index < self.shards:
            return f"shard {self.index} of {self.shards} does not exist"
        extent = whole[self.dim]
        if extent is not None and extent % self.shards:
            return f"{extent} (dimension {self.dim} of {self.tensor}) is not divisible by {self.shards} shards"
        return None


class QuantizedTensor(LLMType, name="quantized_tensor"):
    """A tensor stored in few bits, with scales for blocks of it."""

    described: QuantSchemeAttr
    extents: ir.ArrayAttr

    @classmethod
    def build(cls, scheme: QuantScheme, shape: Sequence[int]) -> "QuantizedTensor":
        """The type; ``shape`` is in logical elements, of 2 or 3 dimensions. ValueError where an invariant fails."""
        return checked(cls.get(QuantSchemeAttr.build(scheme), _integers(shape)))

    @property
    def scheme(self) -> QuantScheme:
        """How it is stored; TypeError where the type does not say it."""
        return self.described.record

    @property
    def shape(self) -> list[int | None]:
        """Shape in logical elements."""
        return [extent.value for extent in self.extents]

    def problem(self) -> str | None:
        """The invariant that does not hold, in words."""
        if not isinstance(self.described, QuantSchemeAttr) or not _are_i64(list(self.extents)):
            return f"a quantized tensor has a scheme and a shape of i64, not {self}"
        shape = [extent.value for extent in self.extents]
        if len(shape) not in (2, 3) or min(shape) <= 0:
            return f"the shape of a quantized tensor must be of two or three positive extents, not {shape}"
        try:
            return self.scheme.problem()
        except TypeError as error:
            return str(error)


def problem(kind: ir.Type) -> str | None:
    """What is wrong with a type, in words; None where all is well or the type is not of this dialect."""
    if isinstance(kind, PagedKVCache | ShardedTensor | QuantizedTensor):
        return kind.problem()
    return None


def is_weight(kind: ir.Type) -> bool:
    """Whether a weight can have this type."""
    return isinstance(kind, ir.RankedTensorType | ShardedTensor | QuantizedTensor)


def checked(kind: _T) -> _T:
    """``kind`` itself; ValueError where one of its invariants fails."""
    found = problem(kind)
    if found is not None:
        raise ValueError(found)
    return kind


def local_shape(kind: ir.Type) -> list[int | None]:
    """Shape of a weight as it lies on this rank; TypeError for a type without a shape."""
    if isinstance(kind, ShardedTensor | QuantizedTensor):
        return kind.shape
    if isinstance(kind, ir.RankedTensorType):
        return [None if kind.is_dynamic_dim(i) else kind.get_dim_size(i) for i in range(kind.rank)]
    raise TypeError(f"{kind} has no shape")


def scheme_of(kind: ir.Type) -> QuantScheme | None:
    """How a weight of this type, or the tensor that it is a shard of, is quantized; None where it is not."""
    if isinstance(kind, ShardedTensor):
        return scheme_of(kind.tensor)
    return kind.scheme if isinstance(kind, QuantizedTensor) else None


def element_name(kind: ir.Type) -> str:
    """Name of the element type of a tensor, sharded tensor, quantized tensor or KV cache."""
    if isinstance(kind, PagedKVCache):
        return kind.format.dtype
    if isinstance(kind, ShardedTensor):
        return element_name(kind.tensor)
    if isinstance(kind, QuantizedTensor):
        return kind.scheme.storage
    if isinstance(kind, ir.RankedTensorType):
        return str(kind.element_type)
    raise TypeError(f"{kind} has no element type")
