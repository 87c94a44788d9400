"""What llmir's IR has no op for, written down as one opaque op: an aten or custom operation, or a whole layer.

Shapes come from running it on the meta device. A layer that cannot run there gets them from its call: it fills its
``output`` argument, or gives what is shaped as its first operand.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmir.frontends.common.support import class_name
from llmir.ir.opaque import opaque
from llmir.ir.weight import Weight

if TYPE_CHECKING:
    from llmir.frontends.common.recording import Recorder

Tensor = torch.Tensor
Forward = Callable[..., Any]
#: Arguments that a layer writes its result to, by the frameworks' names.
OUTPUT_ARGUMENTS = ("output", "out")


class NotInDialectError(Exception):
    """llmir's IR has no op for a layer or operation as it was called; it becomes an opaque one."""


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples, dictionaries and records, each once, in order."""
    return list({id(tensor): tensor for tensor in _walk(value)}.values())


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _walk(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _walk([getattr(value, field.name, None) for field in fields(value)])


def written_arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an aten or custom operation changes in place, by its schema."""
    written = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            written += tensors_in(given)
    return written


def opaque_operation(recorder: Recorder, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """An aten or custom operation as one op; ``result`` is what it gave on the meta device."""
    written = written_arguments(func, args, kwargs)
    filled = {id(tensor) for tensor in written if not recorder.knows(tensor)}  # nothing was there to be read
    operands = [tensor for tensor in tensors_in((args, kwargs)) if id(tensor) not in filled]
    namespace, _, name = func._schema.name.partition("::")
    _emit(recorder, f"{namespace}.{name}", operands, tensors_in(result), written)


def opaque_layer(
    recorder: Recorder, module: torch.nn.Module, forward: Forward, args: Any, kwargs: Any, *, like_operand: bool
) -> Any:
    """A layer as one op with all its weights; what ``forward`` gives on the meta device.

    ``like_operand``: whether one that cannot run there gets its results from its call. NotInDialectError where neither
    gives any.
    """
    given = tensors_in((args, kwargs))
    try:
        result, written = _run(recorder, module, forward, args, kwargs)
    except NotInDialectError:
        if not like_operand:
            raise
        result, written = _from_the_call(forward, args, kwargs)
    storages = {tensor.untyped_storage()._cdata for tensor in written}
    written = [tensor for tensor in given if tensor.untyped_storage()._cdata in storages]
    weights = [recorder.weight(parameter) for parameter in module.parameters()]
    operands = [tensor for tensor in given if recorder.knows(tensor)]
    untouched = {id(tensor) for tensor in operands}
    results = [tensor for tensor in tensors_in(result) if id(tensor) not in untouched]
    _emit(recorder, class_name(module), operands, results, written, weights)
    return result


def _run(
    recorder: Recorder, module: torch.nn.Module, forward: Forward, args: Any, kwargs: Any
) -> tuple[Any, list[Tensor]]:
    """What a layer gives on the meta device, and what it wrote in place.

    Where a processor's own operators do not run there, the layer's plain PyTorch may, which both frameworks call
    ``forward_native``.
    """
    plain = getattr(type(module), "forward_native", None)
    problem: Exception | None = None
    for attempt in (forward, plain.__get__(module) if plain is not None else None):
        if attempt is None:
            continue
        try:
            with recorder.only_running() as written:
                return attempt(*args, **kwargs), written
        except Exception as error:
            problem = problem or error
    raise NotInDialectError(f"{class_name(module)} does not run on the meta device: {problem}") from problem


def _from_the_call(forward: Forward, args: Any, kwargs: Any) -> tuple[Any, list[Tensor]]:
    """Result and written arguments of a layer that nobody ran."""
    named = inspect.signature(forward).bind(*args, **kwargs).arguments
    for name in OUTPUT_ARGUMENTS:
        if isinstance(named.get(name), Tensor):
            return None, [named[name]]
    for tensor in tensors_in((args, kwargs)):
        if tensor.is_floating_point():
            return torch.empty_like(tensor, device="meta"), []
    raise NotInDialectError("nothing in its call says what shape its result has")


def _emit(
    recorder: Recorder,
    kind: str,
    operands: list[Tensor],
    results: list[Tensor],
    written: list[Tensor],
    weights: Sequence[Weight] = (),
) -> None:
    """The op itself, and which value each of its results, and of the tensors that it wrote in place, is from now on."""
    changed = {id(tensor) for tensor in written}
    outcome = [*(tensor for tensor in results if id(tensor) not in changed), *written]
    if not outcome:
        return
    inputs = [recorder.value(tensor) for tensor in operands]
    types = [recorder.type_of(tensor) for tensor in outcome]
    values = opaque(kind, inputs, types, path=recorder.path, weights=weights)
    for tensor, value in zip(outcome, values, strict=True):
        (recorder.write if id(tensor) in changed else recorder.set)(tensor, value)
