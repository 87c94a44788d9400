"""Attributes of the ``llm`` dialect that hold records, and the way between Python values and MLIR attributes."""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

import numbers
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llmir.ir import records
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.base import LLMAttribute
from llmir.ir.bindings import ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import StepPolicy, Variants
from llmir.ir.quant_scheme import QuantScheme


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
        variants: Variants = records.read(Variants, to_python(self.tiles), "variants")
        return variants

    @property
    def policy(self) -> StepPolicy:
        """Run-time conditions; TypeError where the attribute does not hold them."""
        policy: StepPolicy = records.read(StepPolicy, to_python(self.conditions), "policy")
        return policy


class CacheFormatAttr(LLMAttribute, name="cache_format"):
    """A CacheFormat: ``#llm.cache_format<{block_size = 16 : i64, dtype = "bf16", ...}>``."""

    fields: ir.DictAttr

    @classmethod
    def build(cls, format: CacheFormat) -> "CacheFormatAttr":
        """The attribute of a record."""
        return cls.get(to_attribute(asdict(format)))

    @property
    def record(self) -> CacheFormat:
        """The record; TypeError where the attribute does not hold one."""
        format: CacheFormat = records.read(CacheFormat, to_python(self.fields), "cache format")
        return format


class AttentionSpecAttr(LLMAttribute, name="attention_spec"):
    """An AttentionSpec: ``#llm.attention_spec<{cache = {...}, dtype = "bf16", ...}>``."""

    fields: ir.DictAttr

    @classmethod
    def build(cls, spec: AttentionSpec) -> "AttentionSpecAttr":
        """The attribute of a record."""
        return cls.get(to_attribute(asdict(spec)))

    @property
    def record(self) -> AttentionSpec:
        """The record; TypeError where the attribute does not hold one."""
        spec: AttentionSpec = records.read(AttentionSpec, to_python(self.fields), "attention spec")
        return spec


class QuantSchemeAttr(LLMAttribute, name="quant_scheme"):
    """A QuantScheme: ``#llm.quant_scheme<{block = [1, 128], method = "awq", ...}>``."""

    fields: ir.DictAttr

    @classmethod
    def build(cls, scheme: QuantScheme) -> "QuantSchemeAttr":
        """The attribute of a record."""
        return cls.get(to_attribute(asdict(scheme)))

    @property
    def record(self) -> QuantScheme:
        """The record; TypeError where the attribute does not hold one."""
        scheme: QuantScheme = records.read(QuantScheme, to_python(self.fields), "quant scheme")
        return scheme
