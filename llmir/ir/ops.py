"""The ops of a decoder's layers, one op a framework layer; attention is in ``attention.py``, experts in ``experts.py``.

Activations are ranked tensors whose leading dimension is the step's tokens (``?``). Weights are attributes:
a name and a type. Optional attributes and operands are absent where a layer has none. Build these ops with
the functions of ``build.py``, which take Python values.
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from collections.abc import Sequence
from math import prod
from typing import Any

from llmir.ir import types
from llmir.ir.base import LLMOp, optional_attribute, require, same_extent, same_shape, shape
from llmir.ir.bindings import ext, ir
from llmir.ir.weight import Weight

#: Activations that read the gate from the first half of their input and the value from the second.
GATED_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul", "relu_and_mul", "sigmoid_and_mul")
ACTIVATIONS = (
    *GATED_ACTIVATIONS,
    *("silu", "gelu", "gelu_tanh", "gelu_new", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"),
)
UNARY = ("neg", "sigmoid", "silu", "tanh", "exp", "sqrt", "rsqrt", "convert")
BINARY = ("add", "sub", "mul", "div")
ROPE_STYLES = ("half", "interleaved")


def check_weight(weight: Weight, shape: Sequence[int | None], what: str = "weight") -> None:
    """Verify a weight's type, and its shape on this rank."""
    require(types.is_weight(weight.type), f"{what} {weight.name!r} must be a tensor, but is {weight.type}")
    problem = types.problem(weight.type)
    require(problem is None, f"{what} {weight.name!r}: {problem}")
    require(
        same_shape(weight.shape, list(shape)),
        f"{what} {weight.name!r} has shape {weight.shape} on this rank, but the layer needs {list(shape)}",
    )


def check_same_type(a: ir.Value, b: ir.Value, what: str) -> None:
    """Verify that two values have one type."""
    require(a.type == b.type, f"{what} must have one type, but are {a.type} and {b.type}")


class Embedding(LLMOp, name="embedding", traits=[ext.Pure]):
    """Rows of a table: ids ``[tokens]``, weight ``[vocabulary, hidden]``, result ``[tokens, hidden]``."""

    ids: ext.Operand[Any]
    weight: Weight
    result: ext.Result[Any]

    def check(self) -> None:
        hidden = shape(self.result)[-1]
        require(
            same_shape(shape(self.result), [*shape(self.ids), hidden]),
            f"result {self.result.type} does not hold one row for each id of {self.ids.type}",
        )
        check_weight(self.weight, [None, hidden])


class Linear(LLMOp, name="linear", traits=[ext.Pure]):
    """``x @ weight.T + bias``: x ``[..., inputs]``, weight ``[outputs, inputs]``, result ``[..., outputs]``.

    A quantized weight stands for the numbers that it is a rounding of; x may be rounded on its way too.
    """

    x: ext.Operand[Any]
    weight: Weight
    result: ext.Result[Any]
    bias = optional_attribute("bias", Weight)

    def check(self) -> None:
        inputs, outputs = shape(self.x), shape(self.result)
        require(
            same_shape(inputs[:-1], outputs[:-1]),
            f"leading dimensions of x {self.x.type} and result {self.result.type} differ",
        )
        check_weight(self.weight, [outputs[-1], inputs[-1]])
        if self.bias is not None:
            check_weight(self.bias, [outputs[-1]], "bias")


class RMSNorm(LLMOp, name="rms_norm", traits=[ext.Pure]):
    """``x / sqrt(mean(x**2) + epsilon) * (weight + weight_offset)`` over the last dimension.

    With a residual, x is x + residual first, and that sum is the second result (vLLM's fused form).
    Without a weight the factor is 1.
    """

    x: ext.Operand[Any]
    epsilon: ir.FloatAttr
    weight_offset: ir.FloatAttr
    result: ext.Result[Any]
    residual: ext.Operand[Any] | None = None
    residual_result: ext.Result[Any] | None = None
    weight = optional_attribute("weight", Weight)

    def check(self) -> None:
        check_same_type(self.x, self.result, "x and result")
        require(
            (self.residual is None) == (self.residual_result is None),
            "takes a residual and returns one, or neither",
        )
        if self.residual is not None:
            check_same_type(self.x, self.residual, "x and residual")
            check_same_type(self.x, self.residual_result, "x and the residual returned")
        require(self.epsilon.value >= 0, f"epsilon must not be negative, but is {self.epsilon.value}")
        if self.weight is not None:
            check_weight(self.weight, shape(self.x)[-1:])


class LayerNorm(LLMOp, name="layer_norm", traits=[ext.Pure]):
    """``(x - mean) / sqrt(variance + epsilon) * weight + bias`` over the last dimension."""

    x: ext.Operand[Any]
    epsilon: ir.FloatAttr
    result: ext.Result[Any]
    weight = optional_attribute("weight", Weight)
    bias = optional_attribute("bias", Weight)

    def check(self) -> None:
        check_same_type(self.x, self.result, "x and result")
        require(self.epsilon.value >= 0, f"epsilon must not be negative, but is {self.epsilon.value}")
        for what, weight in (("weight", self.weight), ("bias", self.bias)):
            if weight is not None:
                check_weight(weight, shape(self.x)[-1:], what)


class Rope(LLMOp, name="rope", traits=[ext.Pure]):
    """Rotary position embedding of queries and (if given) keys, ``[tokens, heads * head_size]`` or with heads apart.

    ``base`` is theta; ``rotary_size`` leading elements of each head turn. Style ``half`` pairs element i with
    i + rotary_size / 2 (GPT-NeoX), ``interleaved`` with i + 1 (GPT-J). ``scaling`` holds the framework's
    parameters of a long-context variant (yarn, llama3 ...), as they are.
    """

    positions: ext.Operand[Any]
    query: ext.Operand[Any]
    head_size: ir.IntegerAttr
    rotary_size: ir.IntegerAttr
    base: ir.FloatAttr
    style: ir.StringAttr
    query_result: ext.Result[Any]
    key: ext.Operand[Any] | None = None
    key_result: ext.Result[Any] | None = None
    scaling = optional_attribute("scaling", ir.DictAttr)

    def check(self) -> None:
        check_same_type(self.query, self.query_result, "query and its result")
        require((self.key is None) == (self.key_result is None), "takes keys and returns them, or neither")
        if self.key is not None:
            check_same_type(self.key, self.key_result, "key and its result")
        head, rotary = self.head_size.value, self.rotary_size.value
        require(
            0 < rotary <= head and rotary % 2 == 0,
            f"rotary_size must be even and at most head_size {head}, but is {rotary}",
        )
        require(self.style.value in ROPE_STYLES, f"style must be one of {ROPE_STYLES}, but is {self.style}")
        for value in filter(None, (self.query, self.key)):
            width = shape(value)[-1]
            require(
                width is None or width % head == 0,
                f"{value.type} does not hold whole heads of {head} elements",
            )
        require(self.scaling is None or isinstance(self.scaling, ir.DictAttr), "scaling must be a dictionary")


class Activation(LLMOp, name="activation", traits=[ext.Pure]):
    """A layer's non-linearity; the gated kinds halve the last dimension."""

    x: ext.Operand[Any]
    kind: ir.StringAttr
    result: ext.Result[Any]

    def check(self) -> None:
        kind = self.kind.value
        require(kind in ACTIVATIONS, f"unknown activation {kind!r}; known are {', '.join(ACTIVATIONS)}")
        expected = shape(self.x)
        if kind in GATED_ACTIVATIONS and expected[-1] is not None:
            require(expected[-1] % 2 == 0, f"{kind} needs an even last dimension, but x is {self.x.type}")
            expected[-1] //= 2
        require(
            same_shape(shape(self.result), expected),
            f"result of {kind} on {self.x.type} must have shape {expected}, but is {self.result.type}",
        )


class AllReduce(LLMOp, name="all_reduce"):
    """Sum over the ranks of a tensor-parallel group of ``ranks``."""

    x: ext.Operand[Any]
    ranks: ir.IntegerAttr
    result: ext.Result[Any]

    def check(self) -> None:
        check_same_type(self.x, self.result, "x and result")
        require(self.ranks.value > 0, f"ranks must be positive, but is {self.ranks.value}")


class Send(LLMOp, name="send"):
    """Hand activations to pipeline rank ``peer``."""

    x: ext.Operand[Any]
    peer: ir.IntegerAttr

    def check(self) -> None:
        require(self.peer.value >= 0, f"peer must be a rank, but is {self.peer.value}")


class Recv(LLMOp, name="recv"):
    """Take activations from pipeline rank ``peer``."""

    peer: ir.IntegerAttr
    result: ext.Result[Any]

    def check(self) -> None:
        require(self.peer.value >= 0, f"peer must be a rank, but is {self.peer.value}")


class Logits(LLMOp, name="logits", traits=[ext.Pure]):
    """``soft_cap * tanh(scale * x @ weight.T / soft_cap)``; soft_cap 0 leaves the product as it is.

    x ``[tokens, hidden]``, weight ``[vocabulary, hidden]``, result ``[tokens, vocabulary]``.
    """

    x: ext.Operand[Any]
    weight: Weight
    scale: ir.FloatAttr
    soft_cap: ir.FloatAttr
    result: ext.Result[Any]
    bias = optional_attribute("bias", Weight)

    def check(self) -> None:
        inputs, outputs = shape(self.x), shape(self.result)
        require(
            same_shape(inputs[:-1], outputs[:-1]),
            f"leading dimensions of x {self.x.type} and result {self.result.type} differ",
        )
        require(self.soft_cap.value >= 0, f"soft_cap must not be negative, but is {self.soft_cap.value}")
        check_weight(self.weight, [outputs[-1], inputs[-1]])
        if self.bias is not None:
            check_weight(self.bias, [outputs[-1]], "bias")


class Elementwise(LLMOp, name="elementwise", traits=[ext.Pure]):
    """Plain arithmetic between layers: of x alone, of x and y, or of x and a ``scalar``."""

    function: ir.StringAttr
    x: ext.Operand[Any]
    result: ext.Result[Any]
    y: ext.Operand[Any] | None = None
    scalar = optional_attribute("scalar", ir.FloatAttr)

    def check(self) -> None:
        function = self.function.value
        known = (*UNARY, *BINARY)
        require(function in known, f"unknown function {function!r}; known are {', '.join(known)}")
        count = 1 + (self.y is not None) + (self.scalar is not None)
        needed = 2 if function in BINARY else 1
        require(count == needed, f"{function} takes {needed} arguments, but has {count}")
        result = shape(self.result, least_rank=0)
        for argument in filter(None, (self.x, self.y)):
            require(
                broadcasts(shape(argument, least_rank=0), result),
                f"{argument.type} does not broadcast to {self.result.type}",
            )


class Slice(LLMOp, name="slice", traits=[ext.Pure]):
    """``size`` elements of x from ``offset`` along ``dim``; a framework's split is one slice a piece.

    (One result an op: IRDL wants all results of a variadic list to have one type.)
    """

    x: ext.Operand[Any]
    dim: ir.IntegerAttr
    offset: ir.IntegerAttr
    size: ir.IntegerAttr
    result: ext.Result[Any]

    def check(self) -> None:
        whole, dim, offset, size = shape(self.x), self.dim.value, self.offset.value, self.size.value
        require(0 <= dim < len(whole), f"dimension {dim} of {self.x.type} does not exist")
        extent = whole[dim]
        require(
            offset >= 0 and size > 0 and (extent is None or offset + size <= extent),
            f"elements {offset} to {offset + size} are not within the {extent} of dimension {dim}",
        )
        expected = [*whole[:dim], size, *whole[dim + 1 :]]
        require(
            same_shape(shape(self.result), expected),
            f"result must have shape {expected}, but is {self.result.type}",
        )


class Reshape(LLMOp, name="reshape", traits=[ext.Pure]):
    """The same elements in another shape; an unknown extent may take in known ones, as tokens times heads do."""

    x: ext.Operand[Any]
    result: ext.Result[Any]

    def check(self) -> None:
        before, after = shape(self.x, least_rank=0), shape(self.result, least_rank=0)
        require(
            types.element_name(self.x.type) == types.element_name(self.result.type),
            f"element types of {self.x.type} and {self.result.type} differ",
        )
        if before.count(None) == after.count(None) <= 1:
            fewer, more = sorted(prod(size for size in sizes if size is not None) for sizes in (before, after))
            same = more % fewer == 0 if None in before and fewer else more == fewer
            require(same, f"{self.x.type} and {self.result.type} hold different numbers of elements")


def broadcasts(from_shape: Sequence[int | None], to_shape: Sequence[int | None]) -> bool:
    """Whether a shape fits another by NumPy's rules; unknown dimensions fit anything."""
    if len(from_shape) > len(to_shape):
        return False
    tail = to_shape[len(to_shape) - len(from_shape) :]
    return all(a == 1 or same_extent(a, b) for a, b in zip(from_shape, tail, strict=True))
