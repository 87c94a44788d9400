"""What the dialect has no op for: a layer or a tensor operation by its name, with its operands, results and weights.

A module with opaque ops keeps the model's data flow whole. What such an op computes nobody knows, so a pass may
conclude nothing from it but that its results come from its operands and its weights.
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from llmir.ir import types
from llmir.ir.attributes import to_attribute
from llmir.ir.base import LLMOp, require, shape
from llmir.ir.bindings import ext, ir
from llmir.ir.import_level import ImportLevel
from llmir.ir.module import ops_of
from llmir.ir.ops import check_weight
from llmir.ir.weight import Weight

#: On a module that has nothing but the model's attention layers.
ATTENTION_ONLY = "llm.attention_only"
#: IRDL wants all values of a variadic list to have one type, so an opaque op has several: one for each run of operands
#: or results of one type, in order.
RUNS = 12


class Opaque(LLMOp, name="opaque"):
    """A layer or tensor operation without an op: ``kind`` is its class or aten name, ``path`` the module that ran.

    ``weights`` are the layer's parameters on this rank. It may have side effects: it is never removed.
    """

    kind: ir.StringAttr
    path: ir.StringAttr
    __annotations__.update({f"operands_{number}": Sequence[ext.Operand[Any]] for number in range(RUNS)})
    __annotations__.update({f"results_{number}": Sequence[ext.Result[Any]] for number in range(RUNS)})
    # ext.py takes an empty list for an attribute not given, and asks for a default.
    weights: ir.ArrayAttr = ext.attribute(default_factory=lambda: ir.ArrayAttr.get([]))

    def check(self) -> None:
        require(bool(self.kind.value), "kind must be the name of a class or operation, but is empty")
        for value in (*self.operation.operands, *self.operation.results):
            shape(value, least_rank=0)
        for weight in self.weights:
            require(isinstance(weight, Weight), f"weights must be of type #llm.weight, but there is {weight}")
            require(types.is_weight(weight.type), f"weight {weight.name!r} must be a tensor, but is {weight.type}")
            check_weight(weight, weight.shape)


def opaque(
    kind: str,
    operands: Sequence[ir.Value],
    results: Sequence[ir.Type],
    *,
    path: str = "",
    weights: Sequence[Weight] = (),
) -> list[ir.Value]:
    """The results of an opaque op at the insertion point, of the types ``results``.

    Raises ValueError where operands or results change their type more than ``RUNS - 1`` times from one to the next.
    """
    op = Opaque(
        kind=to_attribute(kind),
        path=to_attribute(path),
        weights=to_attribute(list(weights)),
        **_runs("operands", operands, lambda value: value.type),
        **_runs("results", results, lambda kind: kind),
    )
    return list(op.operation.results)


def _runs(name: str, items: Sequence[Any], type_of: Any) -> dict[str, list[Any]]:
    """``items`` in runs of one type, by the names of the op's fields."""
    runs = [list(run) for _, run in groupby(items, key=type_of)]
    if len(runs) > RUNS:
        raise ValueError(f"an opaque op has at most {RUNS} runs of {name} of one type, not {len(runs)}")
    runs += [[] for _ in range(RUNS - len(runs))]
    return {f"{name}_{number}": run for number, run in enumerate(runs)}


def import_level(module: Any) -> ImportLevel:
    """How much of the model a module shows."""
    if ATTENTION_ONLY in module.operation.attributes:
        return "attention"
    return "open" if ops_of(module, Opaque) else "full"


def weight_bytes(op: Opaque) -> float:
    """Bytes of an opaque op's weights on this rank."""
    return float(sum(weight.stored_bytes for weight in op.weights))


def opaque_kinds(module: Any) -> dict[str, int]:
    """How many opaque ops of each kind a module has, the most frequent first."""
    return dict(Counter(op.kind.value for op in ops_of(module, Opaque)).most_common())
