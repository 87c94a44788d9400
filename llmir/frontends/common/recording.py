"""Writing down as llm IR what a forward pass on the meta device does: which tensor is which value, op by op.

Tensor arithmetic between layers is caught one aten operation at a time: it becomes the ops of ``arithmetic.py``, or an
opaque one (``opaque.py``). What becomes of whole layers stands in ``watching.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from llmir.errors import LlmirError
from llmir.frontends.common.arithmetic import ARITHMETIC, SHAPE_ONLY
from llmir.frontends.common.opaque import NotInDialectError, opaque_operation, tensors_in, written_arguments
from llmir.frontends.common.quantized import Quantized
from llmir.frontends.common.support import dtype_name
from llmir.frontends.common.values import Values
from llmir.ir.bindings import ir
from llmir.ir.dtypes import BY_TORCH
from llmir.ir.module import Decoder
from llmir.ir.opaque import opaque
from llmir.ir.types import QuantizedTensor, ShardedTensor, tensor
from llmir.ir.weight import Weight

#: Tokens of the recorded step. A dimension that is a multiple of it counts tokens, because it is a prime that no
#: dimension of a model is a multiple of; it becomes a dynamic dimension. Meta tensors take no memory.
TOKENS = 1_000_003

#: A handler gets the recorder, the layer's path, the layer, and the call's arguments; it returns what the layer would.
Handler = Callable[..., Any]


@dataclass(frozen=True)
class _State:
    """How far a recording has come."""

    operations: int
    values: Any


class Recorder(TorchDispatchMode):
    """Which IR value each tensor is, and which module is running."""

    def __init__(self, model: torch.nn.Module, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self._values = Values()
        self._inputs: dict[int, ir.Value] = {}
        self._weights = {id(weight): name for name, weight in _named_tensors(model)}
        self._views = {_extent(weight): name for name, weight in _named_tensors(model) if not is_lazy(weight)}
        self._running: list[str] = []
        self._written: list[torch.Tensor] | None = None

    def value(self, tensor: torch.Tensor) -> ir.Value:
        """The IR value of a tensor that a layer or an operation gets."""
        value, writes = self._values.find(tensor)
        if writes:
            [value] = opaque("written", [*filter(None, [value]), *writes], [self.type_of(tensor)], path=self.path)
        elif value is None:
            value = self._input(tensor)
        self.set(tensor, value)
        return value

    def _input(self, tensor: torch.Tensor) -> ir.Value:
        """What no operation gave: a weight or buffer, an argument of the decoder, or numbers of the model's code."""
        name = self._weights.get(id(tensor))
        if name is None:
            return opaque("constant", [], [self.type_of(tensor)], path=self.path)[0]
        if id(tensor) not in self._inputs:
            self._inputs[id(tensor)] = self.decoder.input(name, self.type_of(tensor))
        return self._inputs[id(tensor)]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the way from the inputs to the outputs."""
        return tensor in self._values or id(tensor) in self._weights

    def set(self, tensor: torch.Tensor, value: ir.Value) -> torch.Tensor:
        """Say which IR value a tensor is."""
        self._values.set(tensor, value)
        return tensor

    def write(self, tensor: torch.Tensor, value: ir.Value) -> torch.Tensor:
        """Say which IR value a tensor is after an operation changed it in place."""
        self._values.write(tensor, value)
        return tensor

    def new(self, value: ir.Value, like: torch.Tensor, *last: int) -> torch.Tensor:
        """An empty tensor for an IR value: shaped as ``like``, with other last dimensions if given."""
        shape = [*like.shape[: like.ndim - len(last)], *last]
        return self.set(torch.empty(shape, dtype=like.dtype, device="meta"), value)

    def weight(self, parameter: torch.Tensor | Quantized, *, dim: int = 0, shards: int = 1, index: int = 0) -> Weight:
        """A parameter by name and type; one of ``shards`` cut along ``dim`` if there are several.

        The whole parameter in another shape is that parameter, in the shape given. Raises NotInDialectError for a
        tensor that is no parameter of the model.
        """
        scheme = parameter.scheme if isinstance(parameter, Quantized) else None
        stored = parameter.numbers if isinstance(parameter, Quantized) else parameter
        name = self._weights.get(id(stored))
        if name is None and stored.is_contiguous():
            name = self._views.get(_extent(stored))
        if name is None:
            raise NotInDialectError("a weight is computed, and no parameter of the model")
        whole = list(parameter.shape)
        whole[dim : dim + 1] = [size * shards for size in whole[dim : dim + 1]]
        kind = (
            tensor(self.shape_of(whole), self.element(stored))
            if scheme is None
            else QuantizedTensor.build(scheme, whole)
        )
        if shards > 1:
            kind = ShardedTensor.build(kind, dim=dim, shards=shards, index=index)
        return Weight.build(name, kind)

    def type_of(self, value: torch.Tensor) -> ir.Type:
        """The IR type of a tensor."""
        return tensor(self.shape_of(value.shape), self.element(value))

    def shape_of(self, shape: Sequence[int]) -> list[int | None]:
        """A shape with None for dimensions that count tokens."""
        return [None if size and size % TOKENS == 0 else size for size in shape]

    def element(self, value: torch.Tensor) -> str:
        """The IR's name of a tensor's dtype; NotInDialectError where it has none."""
        name = dtype_name(value.dtype)
        if name not in BY_TORCH:
            raise NotInDialectError(f"the IR has no element type for {name}")
        return BY_TORCH[name].name

    @property
    def path(self) -> str:
        """Path of the module that is running."""
        return self._running[-1] if self._running else "the model"

    @contextmanager
    def running(self, path: str) -> Iterator[None]:
        """Ops and errors within belong to the module at ``path``."""
        self._running.append(path)
        try:
            with ir.Location.name(path):
                yield
        finally:
            self._running.pop()

    @property
    def only_runs(self) -> bool:
        """Whether operations are run and not recorded, as within a layer that is recorded as one opaque op."""
        return self._written is not None

    @contextmanager
    def only_running(self) -> Iterator[list[torch.Tensor]]:
        """Run what is within without recording it; gives the tensors that it writes in place.

        Handlers of layers within answer as ever, with the right shapes; the ops that they emit are taken back.
        """
        written: list[torch.Tensor] = []
        self._written = written
        before = self._state()
        try:
            yield written
        finally:
            self._take_back(before)
            self._written = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Take back what is recorded within where an error is raised, or where it is not valid IR."""
        before = self._state()
        try:
            yield
            operations = ir.InsertionPoint.current.block.operations
            for number in range(before.operations, len(operations)):
                if not operations[number].operation.verify():
                    raise NotInDialectError("its op is not valid")
        except Exception:
            self._take_back(before)
            raise

    def _state(self) -> _State:
        return _State(len(ir.InsertionPoint.current.block.operations), self._values.snapshot())

    def _take_back(self, before: _State) -> None:
        """Forget all that was recorded since, the operations too."""
        operations = ir.InsertionPoint.current.block.operations
        while len(operations) > before.operations:
            operations[len(operations) - 1].operation.erase()
        self._values.restore(before.values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = _run(func, args, kwargs)
        written = written_arguments(func, args, kwargs)
        if self._written is not None:
            self._written += written
        elif any(map(self.knows, tensors_in((args, kwargs)))):
            with _disable_current_modes():
                self._record(func, args, kwargs, result, written)
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any, written: list[torch.Tensor]) -> None:
        """Write down an operation on the way from the inputs to the outputs."""
        if func.overloadpacket in SHAPE_ONLY:
            return
        operation = ARITHMETIC.get(func.overloadpacket)
        if operation is not None:
            try:
                with self.attempt():
                    operation(self, func, args, kwargs, result)
            except LlmirError:
                raise
            except Exception:  # one of the many ways to call an operation that llmir's op does not have
                operation = None
        if operation is None:
            opaque_operation(self, func, args, kwargs, result)
        else:
            for changed in written:
                self.write(changed, self.value(changed))


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation's result; where meta tensors meet real ones, those that a model's code has made, all are meta."""
    tensors = tensors_in((args, kwargs))
    if not any(tensor.is_meta for tensor in tensors) or all(tensor.is_meta or not tensor.ndim for tensor in tensors):
        return func(*args, **kwargs)

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.is_meta or not tensor.ndim else tensor.to("meta")

    args, kwargs = tree_map_only(torch.Tensor, empty, (args, kwargs))
    return func(*args, **kwargs)


def _extent(tensor: torch.Tensor) -> tuple[int, int, int]:
    """What a tensor and its views of another shape have in common: their memory, where in it, and how much of it."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel()


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_buffers()
    yield from model.named_parameters()
