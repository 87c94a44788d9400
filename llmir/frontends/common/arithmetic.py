"""Plain tensor arithmetic between layers, from aten operations to llm IR.

Each function gets the recorder, the aten overload, its arguments, and the result on the meta device, whose shape
and dtype are the truth; it says which IR values the results are. It raises NotInDialectError for a call that llmir's
op cannot express; any other error means the same, and the operation becomes an opaque op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from llmir.frontends.common.opaque import NotInDialectError
from llmir.ir import build

if TYPE_CHECKING:
    from llmir.frontends.common.recording import Recorder

aten = torch.ops.aten
Arithmetic = Callable[["Recorder", Any, tuple[Any, ...], dict[str, Any], Any], None]


def _same(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """A copy or an alias."""
    recorder.set(result, recorder.value(args[0]))


def _convert(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    x = recorder.value(args[0])
    if result.dtype != args[0].dtype:
        x = build.elementwise("convert", x, result_type=recorder.type_of(result))
    recorder.set(result, x)


def _reshape(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    recorder.set(result, build.reshape(recorder.value(args[0]), recorder.shape_of(result.shape)))


def _split(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    x, dim = args[0], _dim(args, kwargs, position=2)
    _require_known(recorder, x, dim, func)
    pieces = build.split(recorder.value(x), [piece.shape[dim] for piece in result], dim=dim)
    for piece, value in zip(result, pieces, strict=True):
        recorder.set(piece, value)


def _slice(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    x, dim = args[0], _dim(args, kwargs, position=1)
    if result.shape == x.shape:
        recorder.set(result, recorder.value(x))
        return
    _require_known(recorder, x, dim, func)
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    if len(args) > 4 and args[4] != 1:
        raise NotInDialectError(f"it takes every {args[4]}th element of a tensor")
    offset = start if start >= 0 else start + x.shape[dim]
    recorder.set(result, build.slice(recorder.value(x), offset, result.shape[dim], dim=dim))


def _select(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    x, dim, index = args
    _require_known(recorder, x, dim, func)
    piece = build.slice(recorder.value(x), index % x.shape[dim], 1, dim=dim)
    recorder.set(result, build.reshape(piece, recorder.shape_of(result.shape)))


def _unary(name: str) -> Arithmetic:
    def emit(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        recorder.set(result, build.elementwise(name, recorder.value(args[0])))

    return emit


def _activation(name: str) -> Arithmetic:
    def emit(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        tanh = kwargs.get("approximate") == "tanh"
        recorder.set(result, build.activation(recorder.value(args[0]), f"{name}_tanh" if tanh else name))

    return emit


def _binary(name: str) -> Arithmetic:
    def emit(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if kwargs.get("alpha", 1) != 1 or kwargs.get("rounding_mode") is not None:
            raise NotInDialectError(f"it computes {func} with {kwargs}")
        x, y = args[0], args[1]
        kind = recorder.type_of(result)
        if isinstance(y, torch.Tensor) and (y.is_meta or y.ndim):  # else a number that the model's code wrote as one
            value = build.elementwise(name, recorder.value(x), recorder.value(y), result_type=kind)
        else:
            value = build.elementwise(name, recorder.value(x), scalar=float(y), result_type=kind)
        recorder.set(result, value)

    return emit


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], *, position: int) -> int:
    dim = args[position] if len(args) > position else kwargs.get("dim", 0)
    return dim % args[0].ndim


def _require_known(recorder: Recorder, x: torch.Tensor, dim: int, func: Any) -> None:
    """Parts of a dimension that counts tokens would be parts of the recorded step, not of every step."""
    if recorder.shape_of(x.shape)[dim] is None:
        raise NotInDialectError(f"it takes some of the step's tokens apart ({func})")


#: By operation, whatever its overload; an in-place one gives its result, the same tensor, a new value.
ARITHMETIC: dict[Any, Arithmetic] = {
    **dict.fromkeys((aten.alias, aten.clone, aten.detach, aten.contiguous), _same),
    aten._to_copy: _convert,
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.unsqueeze, aten.squeeze), _reshape),
    **dict.fromkeys((aten.split, aten.split_with_sizes), _split),
    aten.slice: _slice,
    aten.select: _select,
    **dict.fromkeys((aten.add, aten.add_), _binary("add")),
    **dict.fromkeys((aten.sub, aten.sub_), _binary("sub")),
    **dict.fromkeys((aten.mul, aten.mul_), _binary("mul")),
    **dict.fromkeys((aten.div, aten.div_), _binary("div")),
    aten.neg: _unary("neg"),
    aten.tanh: _unary("tanh"),
    aten.sigmoid: _unary("sigmoid"),
    aten.exp: _unary("exp"),
    aten.sqrt: _unary("sqrt"),
    aten.rsqrt: _unary("rsqrt"),
    aten.silu: _unary("silu"),
    aten.relu: _activation("relu"),
    aten.gelu: _activation("gelu"),
}

#: Operations that take nothing but the shape and dtype of a tensor.
SHAPE_ONLY = frozenset({aten.empty_like, aten.new_empty})
