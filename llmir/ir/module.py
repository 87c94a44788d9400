"""A module: one model on one rank, with the facts about both as attributes and one function, ``@decoder``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from llmir.ir import types
from llmir.ir.attributes import AttentionSpecAttr, to_attribute, to_python
from llmir.ir.bindings import func, ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.types import PagedKVCache

#: What every layer of a step shares: name, shape (None: known when it runs), element type.
STEP_INPUTS: tuple[tuple[str, list[int | None], str], ...] = (
    ("input_ids", [None], "i64"),
    ("positions", [None], "i64"),
    ("slots", [None], "i64"),
    ("block_table", [None, None], "i32"),
    ("query_start", [None], "i32"),
    ("sequence_lengths", [None], "i32"),
)


@dataclass(frozen=True)
class ModelInfo:
    """What a module is of."""

    framework: str
    """Name and version: ``vllm 0.32.0``."""
    model: str
    rank: int = 0
    world_size: int = 1
    block_size_fixed: bool = False
    """Whether the user set the block size: no pass may change it then."""
    allowed_block_sizes: tuple[int, ...] = ()
    """Block sizes the framework accepts, in tokens."""

    def __post_init__(self) -> None:
        # A path's bytes that Python cannot read in the locale's encoding are surrogates, which MLIR does not take.
        readable = self.model.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        object.__setattr__(self, "model", readable)


def new_module(info: ModelInfo) -> ir.Module:
    """An empty module (in the current context) with ``info`` as its attributes."""
    module = ir.Module.create(ir.Location.name(info.model))
    for name, value in vars(info).items():
        module.operation.attributes[f"llm.{name}"] = to_attribute(value)
    return module


def model_info(module: Any) -> ModelInfo:
    """The attributes of a module; KeyError where it lacks one."""
    attributes, values = operation(module).attributes, {}
    for name in ModelInfo.__dataclass_fields__:
        if f"llm.{name}" not in attributes:
            raise KeyError(f"the module has no attribute llm.{name}")
        values[name] = to_python(attributes[f"llm.{name}"])
    values["allowed_block_sizes"] = tuple(values["allowed_block_sizes"])
    return ModelInfo(**values)


def operation(module: Any) -> ir.Operation:
    """The operation of a module, which may come as ir.Module or, in a pass, as the operation itself."""
    return module.operation


def body(module: Any) -> ir.Block:
    """The block of a module."""
    return operation(module).regions[0].blocks[0]


class Decoder:
    """The function under construction; each step input is an attribute (``input_ids``, ``slots`` ...)."""

    input_ids: ir.Value
    positions: ir.Value
    slots: ir.Value
    block_table: ir.Value
    query_start: ir.Value
    sequence_lengths: ir.Value

    def __init__(self, function: func.FuncOp):
        self._function = function
        self._labels: list[ir.Attribute] = []
        self._results: list[ir.Value] | None = None
        for name, shape, element_type in STEP_INPUTS:
            setattr(self, name, self.input(name, types.tensor(shape, element_type)))

    def _argument(self, type: ir.Type, label: str, name: str) -> ir.Value:
        self._labels.append(ir.DictAttr.get({label: ir.StringAttr.get(name)}))
        return self._function.entry_block.add_argument(type, ir.Location.name(name))

    def input(self, name: str, type: ir.Type) -> ir.Value:
        """A further argument, called ``name``."""
        return self._argument(type, "llm.name", name)

    def cache(self, layer: str, type: PagedKVCache) -> ir.Value:
        """An argument that is the KV cache of an attention layer."""
        return self._argument(type, "llm.layer", layer)

    def output(self, *results: ir.Value) -> None:
        """What the function returns; call it once, at the end."""
        self._results = list(results)

    def _finish(self) -> None:
        if self._results is None:
            raise ValueError("decoder was left without output(...)")
        block = self._function.entry_block
        with ir.InsertionPoint(block):
            func.ReturnOp(self._results)
        _set_function_type(self._function, [a.type for a in block.arguments], [r.type for r in self._results])
        self._function.attributes["arg_attrs"] = ir.ArrayAttr.get(self._labels)


def _set_function_type(function: Any, inputs: list[ir.Type], results: list[ir.Type]) -> None:
    function.attributes["function_type"] = ir.TypeAttr.get(ir.FunctionType.get(inputs, results))


@contextmanager
def decoder(module: ir.Module) -> Iterator[Decoder]:
    """Build ``@decoder`` in a module: within the block ops go into the function.

    Example::

        with decoder(module) as d:
            x = build.embedding(d.input_ids, table)
            d.output(x)
    """
    with ir.InsertionPoint(module.body):
        function = func.FuncOp("decoder", ir.FunctionType.get([], []))
    function.add_entry_block()
    with ir.InsertionPoint(function.entry_block):
        under_construction = Decoder(function)
        yield under_construction
    under_construction._finish()


def decoder_of(module: Any) -> func.FuncOp:
    """The function ``@decoder`` of a module; KeyError if there is none."""
    for op in body(module).operations:
        if op.operation.name == "func.func" and op.attributes["sym_name"].value == "decoder":
            return op
    raise KeyError("the module has no function @decoder")


def ops_of(module: Any, *kinds: type) -> list[Any]:
    """All ops of the given classes, in program order: ``ops_of(module, PagedAttention)``.

    Keep the module while the ops are in use: an op does not keep it alive, and reading one afterwards crashes.
    """
    found: list[Any] = []

    def visit(op: ir.Operation) -> ir.WalkResult:
        if isinstance(op.opview, kinds):
            found.append(op.opview)
        return ir.WalkResult.ADVANCE

    operation(module).walk(visit, ir.WalkOrder.PRE_ORDER)
    return found


def caches_of(module: Any) -> dict[str, PagedKVCache]:
    """The KV cache type of each attention layer, by layer."""
    function = decoder_of(module)
    caches = {}
    for argument, labels in zip(function.arguments, function.arg_attrs, strict=True):
        if "llm.layer" in labels:
            caches[labels["llm.layer"].value] = argument.type
    return caches


def reformat_caches(module: Any, change: Callable[[str, CacheFormat], CacheFormat]) -> None:
    """Give every layer's cache the format ``change(layer, format)``: the decoder's arguments, and all types and specs
    that say it again."""

    def retype(layer: str, value: Any) -> None:
        kind = value.type
        value.set_type(PagedKVCache.build(change(layer, kind.format), max_length=kind.max_length))

    function = decoder_of(module)
    for argument, labels in zip(function.arguments, function.arg_attrs, strict=True):
        if "llm.layer" in labels:
            retype(labels["llm.layer"].value, argument)
    for op in function.entry_block.operations:
        attributes = op.operation.attributes
        for result in op.operation.results:
            if isinstance(result.type, PagedKVCache):
                retype(attributes["layer"].value, result)
        if "spec" in attributes:
            spec = attributes["spec"].record
            cache = change(attributes["layer"].value, spec.cache)
            attributes["spec"] = AttentionSpecAttr.build(replace(spec, cache=cache))
    _set_function_type(function, [a.type for a in function.arguments], list(function.type.results))
