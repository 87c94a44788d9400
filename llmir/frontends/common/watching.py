"""Watching one forward pass of a model on the meta device, and what becomes of each of its modules.

A layer with a handler (``layers.py``) is not run: the handler emits its op and answers with empty tensors of the right
shape. A module that has attention layers within is entered, and so is one that only composes other layers. All else is
one opaque op: a layer without a handler, and one that its handler cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from llmir.errors import LlmirError
from llmir.frontends.common.opaque import Forward, opaque_layer
from llmir.frontends.common.recording import TOKENS, Handler, Recorder
from llmir.ir import text
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.module import ModelInfo, caches_of, decoder, new_module
from llmir.ir.remarks import of_layers


class UnwatchedError(Exception):
    """The forward pass of a model cannot be watched to its end, and why."""


@dataclass(frozen=True)
class Layers:
    """How a frontend reads the modules of a model."""

    handlers: Mapping[type, Handler]
    """By exact class, because a subclass computes something else."""
    attention: Mapping[str, nn.Module]
    """The attention layers, by the framework's names."""
    is_one: Callable[[nn.Module], bool] = lambda module: False
    """Whether a module is one layer whatever it holds, such as one that keeps a state or routes to experts."""

    def attach(self, model: nn.Module, recorder: Recorder) -> None:
        """Put what records them in the place of the forward passes of all modules."""
        attention = {id(layer) for layer in self.attention.values()}
        holds = {path: any(id(m) in attention for m in module.modules()) for path, module in model.named_modules()}
        modules = {**dict(model.named_modules()), **self._outside(model)}
        for path, module in modules.items():
            forward, handler = module.forward, self.handlers.get(type(module))
            if id(module) in attention:
                # Without a handler there is no kernel, and the frontend has refused the layer before.
                module.forward = _attention(recorder, path, module, self.handlers[type(module)])
            elif holds[path]:
                module.forward = _entered(recorder, path, forward)
            else:
                one = self.is_one(module)
                like_operand = one or holds.get(path.rpartition(".")[0], True)
                one |= not any(True for _ in module.children())
                module.forward = _Layer(recorder, path, module, forward, handler, one, like_operand)

    def _outside(self, model: nn.Module) -> dict[str, nn.Module]:
        """Attention layers that a model calls without having them as its modules."""
        own = {id(module) for module in model.modules()}
        return {name: layer for name, layer in self.attention.items() if id(layer) not in own}


def record(
    model: nn.Module,
    info: ModelInfo,
    layers: Layers,
    forward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> ir.Module:
    """One forward pass of a model on the meta device as an llm module; the model is of no use afterwards.

    ``forward`` gets input ids and positions, int64 [TOKENS] both, and gives logits. Raises UnwatchedError where the
    pass does not come to its end or leaves out an attention layer, UnsupportedLayerError for an attention layer that no
    kernel computes.
    """
    with context(), ir.Location.unknown():
        module = new_module(info)
        with decoder(module) as d:
            recorder = Recorder(model, d)
            layers.attach(model, recorder)
            ids, positions = (torch.empty(TOKENS, dtype=torch.int64, device="meta") for _ in range(2))
            recorder.set(ids, d.input_ids)
            recorder.set(positions, d.positions)
            try:
                # A function that is to be compiled would be traced for its own sake; as it stands it says the same.
                with torch.no_grad(), torch.compiler.set_stance("force_eager"), _autocast_on_meta(), recorder:
                    logits = forward(ids, positions)
                d.output(recorder.value(logits))
            except (LlmirError, UnwatchedError):
                raise
            except Exception as error:
                raise UnwatchedError(f"{type(error).__name__}: {error}") from error
        seen = caches_of(module)
        if missing := [name for name in layers.attention if name not in seen]:
            raise UnwatchedError(f"it leaves out {of_layers(missing)}")
        text.verify(module)
        return module


@contextmanager
def _autocast_on_meta() -> Iterator[None]:
    """torch.autocast knows no meta device; models switch it off there, where it is off."""
    autocast = torch.autocast

    def on_any_device(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **kwargs)

    torch.autocast = on_any_device  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.autocast = autocast  # type: ignore[misc]


def _attention(recorder: Recorder, path: str, module: nn.Module, handler: Handler) -> Forward:
    def call(*args: Any, **kwargs: Any) -> Any:
        if recorder.only_runs:
            raise UnwatchedError(f"attention layer {path} is called by a layer that is opaque")
        with _disable_current_modes(), recorder.running(path):
            return handler(recorder, path, module, *args, **kwargs)

    return call


def _entered(recorder: Recorder, path: str, forward: Forward) -> Forward:
    def call(*args: Any, **kwargs: Any) -> Any:
        with recorder.running(path or "the model"):
            return forward(*args, **kwargs)

    return call


@dataclass
class _Layer:
    """The forward pass of a module without attention layers within."""

    recorder: Recorder
    path: str
    module: nn.Module
    forward: Forward
    handler: Handler | None
    one: bool
    """Whether it is one layer, not to be entered."""
    like_operand: bool
    """Whether, where it cannot run, it is taken to give what is shaped as its operand; parts of decoder layers do."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.recorder.only_runs:
            return (self._handled or self.forward)(*args, **kwargs)
        way = self._handled or (None if self.one else self.forward)
        with self.recorder.running(self.path):
            if way is not None:
                try:
                    with self.recorder.attempt():
                        return way(*args, **kwargs)
                except LlmirError:
                    raise
                except Exception:  # whatever a handler or an op does not expect: an opaque op says less, and holds
                    pass
            with self.recorder.attempt():
                return opaque_layer(
                    self.recorder, self.module, self.forward, args, kwargs, like_operand=self.like_operand
                )

    @property
    def _handled(self) -> Forward | None:
        """The layer as its handler answers for it."""
        handler = self.handler
        if handler is None:
            return None

        def call(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return handler(self.recorder, self.path, self.module, *args, **kwargs)

        return call
