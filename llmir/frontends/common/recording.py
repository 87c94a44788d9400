"""Watching one forward pass of a model on the meta device, and writing it down as llm IR.

Layers that llmir knows are not run: their handler (``layers.py``) emits an op and answers with empty tensors of the
right shape. Plain tensor arithmetic between layers is caught one aten operation at a time. What is neither is refused
by the path of the module that was running.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.arithmetic import ARITHMETIC, SHAPE_ONLY
from llmir.frontends.common.support import class_name, dtype_name
from llmir.ir import text
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.dtypes import BY_TORCH
from llmir.ir.module import Decoder, ModelInfo, decoder, new_module
from llmir.ir.types import ShardedTensor, tensor
from llmir.ir.weight import Weight

#: Tokens of the recorded step. A dimension that is a multiple of it counts tokens, because it is a prime that no
#: dimension of a model is a multiple of; it becomes a dynamic dimension. Meta tensors take no memory.
TOKENS = 1_000_003

#: A handler gets the recorder, the layer's path, the layer, and the call's arguments; it returns what the layer would.
Handler = Callable[..., Any]


class Recorder(TorchDispatchMode):
    """Which IR value each tensor is, and which module is running."""

    def __init__(self, model: torch.nn.Module, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self._values: dict[int, ir.Value] = {}
        # Tensors are told apart by their id, which Python gives to the next one when a tensor dies: none may.
        self._alive: list[torch.Tensor] = []
        self._weights = {id(weight): name for name, weight in _named_tensors(model)}
        self._running: list[str] = []

    def value(self, tensor: torch.Tensor) -> ir.Value:
        """The IR value of a tensor that a layer gets; UnsupportedLayerError if it came from nowhere."""
        if id(tensor) not in self._values:
            name = self._weights.get(id(tensor))
            if name is None:
                raise UnsupportedLayerError(self.path, "it uses a tensor that no recorded layer produced")
            # A weight or buffer in plain arithmetic comes in as an argument of the decoder.
            self.set(tensor, self.decoder.input(name, self.type_of(tensor)))
        return self._values[id(tensor)]

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has, or can be given, an IR value."""
        return id(tensor) in self._values or id(tensor) in self._weights

    def set(self, tensor: torch.Tensor, value: ir.Value) -> torch.Tensor:
        """Say which IR value a tensor is."""
        self._values[id(tensor)] = value
        self._alive.append(tensor)
        return tensor

    def new(self, value: ir.Value, like: torch.Tensor, *last: int) -> torch.Tensor:
        """An empty tensor for an IR value: shaped as ``like``, with other last dimensions if given."""
        shape = [*like.shape[: like.ndim - len(last)], *last]
        return self.set(torch.empty(shape, dtype=like.dtype, device="meta"), value)

    def weight(self, parameter: torch.Tensor, *, dim: int = 0, shards: int = 1, index: int = 0) -> Weight:
        """A parameter by name and type; one of ``shards`` cut along ``dim`` if there are several."""
        kind = self.type_of(parameter)
        if shards > 1:
            whole = list(parameter.shape)
            whole[dim] *= shards
            kind = ShardedTensor.build(tensor(whole, self.element(parameter)), dim=dim, shards=shards, index=index)
        return Weight.build(self._weights[id(parameter)], kind)

    def type_of(self, value: torch.Tensor) -> ir.Type:
        """The IR type of a tensor."""
        return tensor(self.shape_of(value.shape), self.element(value))

    def shape_of(self, shape: Sequence[int]) -> list[int | None]:
        """A shape with None for dimensions that count tokens."""
        return [None if size and size % TOKENS == 0 else size for size in shape]

    def element(self, value: torch.Tensor) -> str:
        """The IR's name of a tensor's dtype."""
        if dtype_name(value.dtype) not in BY_TORCH:
            raise UnsupportedLayerError(self.path, f"it works in {value.dtype}")
        return BY_TORCH[dtype_name(value.dtype)].name

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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
        if not any(map(self.knows, tensors)):
            return result  # not on the way from the inputs to the outputs
        if func.overloadpacket in SHAPE_ONLY:
            return result  # whoever reads what is not filled in by a layer is refused
        operation = ARITHMETIC.get(func.overloadpacket)
        if operation is None:
            raise UnsupportedLayerError(self.path, f"it computes {func}, which llmir's IR does not have")
        operation(self, func, args, kwargs or {}, result)
        return result


def record(
    model: torch.nn.Module,
    info: ModelInfo,
    handlers: dict[type, Handler],
    is_stateful: Callable[[torch.nn.Module], bool],
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> ir.Module:
    """One forward pass of a model on the meta device as an llm module; the model is of no use afterwards.

    ``forward`` gets input ids and positions, int64 [TOKENS] both, and gives logits. For the rest see :func:`attach`.
    Raises UnsupportedLayerError for a layer llmir does not know.
    """
    with context(), ir.Location.unknown():
        module = new_module(info)
        with decoder(module) as d:
            recorder = Recorder(model, d)
            attach(model, recorder, handlers, is_stateful)
            ids, positions = (torch.empty(TOKENS, dtype=torch.int64, device="meta") for _ in range(2))
            recorder.set(ids, d.input_ids)
            recorder.set(positions, d.positions)
            with torch.no_grad(), recorder:
                logits = forward(ids, positions)
            d.output(recorder.value(logits))
        text.verify(module)
        return module


def attach(
    model: torch.nn.Module,
    recorder: Recorder,
    handlers: dict[type, Handler],
    is_stateful: Callable[[torch.nn.Module], bool],
) -> None:
    """Put handlers in the place of the layers they know; other layers refuse to be called.

    A module without a handler is entered if it only composes others. A leaf is a layer that llmir does not know, and
    so is a module that keeps a cache or a state of its own, whatever else it holds: ``is_stateful`` knows those.
    """
    for path, module in model.named_modules():
        handler = handlers.get(type(module))
        if handler is not None:
            module.forward = _recorded(recorder, path, module, handler)
        elif is_stateful(module) or not any(True for _ in module.children()):
            module.forward = _refused(path, module)
        else:
            module.forward = _entered(recorder, path, module.forward)


def _recorded(recorder: Recorder, path: str, module: torch.nn.Module, handler: Handler) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.utils._python_dispatch._disable_current_modes(), recorder.running(path):
            return handler(recorder, path, module, *args, **kwargs)

    return forward


def _entered(recorder: Recorder, path: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        with recorder.running(path or "the model"):
            return original(*args, **kwargs)

    return forward


def _refused(path: str, module: torch.nn.Module) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        raise UnsupportedLayerError(path, f"its class {class_name(module)} is not one that llmir knows")

    return forward


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_buffers()
    yield from model.named_parameters()
