"""How a layer's quantized weights are stored, read from the layer's parameters.

Frameworks have a class for each method and each kernel, but all keep the same few tensors: the numbers, packed or not,
their scales, and zero points. Names and shapes of these tell the scheme, whichever class made them; what they do not
tell is not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.support import class_name, dtype_name
from llmir.ir.dtypes import BY_TORCH
from llmir.ir.quant_scheme import QuantScheme

Tensor = torch.Tensor
#: The tensors' names in both frameworks.
NUMBERS = ("qweight", "weight_packed", "weight")
SCALES = ("scales", "weight_scale", "weight_scale_inv")
ZERO_POINTS = ("qzeros", "weight_zero_point")
#: Which lie with the inputs first.
INPUTS_FIRST = ("scales",)
#: Scales of one byte without a type of their own are powers of two (OCP microscaling formats, version 1.0).
MICROSCALE = "f8E8M0FNU"
#: Outputs and inputs of a block of DeepSeek's 8-bit floats, and what is taken where shapes leave it open.
USUAL_BLOCK = 128
#: Linear layers that frameworks merge into one, such as query, key and value: each may bring a scale for its tensor.
MOST_MERGED = 8


@dataclass(frozen=True)
class Quantized:
    """A quantized weight of a layer."""

    numbers: Tensor
    """The parameter that stands for it."""
    scheme: QuantScheme
    shape: tuple[int, ...]
    """[outputs, inputs] or [experts, outputs, inputs] of this rank, in logical elements."""


def quantized(layer: nn.Module, shape: Sequence[int], method: str, *, prefix: str = "") -> Quantized:
    """The weight of a layer whose parameters begin with ``prefix``, of logical ``shape`` on this rank.

    ``method`` is the framework's name. Raises NotInDialectError where names and shapes do not tell how it is stored.
    """
    parameters = {
        name.removeprefix(prefix): parameter
        for name, parameter in layer.named_parameters(recurse=False)
        if name.startswith(prefix) and not is_lazy(parameter)
    }
    numbers, scales = _one_of(parameters, NUMBERS), _one_of(parameters, SCALES)
    if numbers is None or scales is None:
        raise NotInDialectError(f"{class_name(layer)} has no {' or '.join(NUMBERS if numbers is None else SCALES)}")
    block = _block(*scales, shape)
    scale = _element(scales[1])
    scale = MICROSCALE if scale == "ui8" else scale
    storage = _storage(numbers[1], prod(shape), scale)
    plain = QuantScheme(_method(method), storage, block, scale)
    zero_points = _one_of(parameters, ZERO_POINTS)
    kept = "" if zero_points is None else f"i{_bits(zero_points[1], plain.scales(shape))}"
    scheme = QuantScheme(plain.method, storage, block, scale, kept)
    if problem := scheme.problem():
        raise NotInDialectError(f"{class_name(layer)} is not known: {problem}")
    return Quantized(numbers[1], scheme, tuple(shape))


def _method(name: str) -> str:
    """A method without what frameworks say of the kernels that they have for it."""
    return name.removeprefix("auto_").removesuffix("_marlin").replace("_", "-")


def _one_of(parameters: Mapping[str, Tensor], names: Sequence[str]) -> tuple[str, Tensor] | None:
    return next(((name, parameters[name]) for name in names if name in parameters), None)


def _element(tensor: Tensor) -> str:
    """The IR's name of a tensor's dtype."""
    name = dtype_name(tensor.dtype)
    if name not in BY_TORCH:
        raise NotInDialectError(f"the IR has no element type for {name}")
    return BY_TORCH[name].name


def _bits(tensor: Tensor, count: int) -> int:
    """Bits of each of ``count`` numbers that fill a tensor."""
    bits, rest = divmod(tensor.numel() * 8 * tensor.element_size(), count)
    if rest:
        raise NotInDialectError(f"{count} numbers do not fill {tuple(tensor.shape)} of {dtype_name(tensor.dtype)}")
    return bits


def _storage(numbers: Tensor, count: int, scale: str) -> str:
    """The element type of ``count`` numbers, which may lie packed in larger ones."""
    bits, element = _bits(numbers, count), _element(numbers)
    if numbers.dtype.is_floating_point:
        return element
    if bits == 4 and scale.startswith("f8"):  # OCP's and NVIDIA's formats of 4-bit floats have such scales
        return "f4E2M1FN"
    return f"i{bits}"


def _block(name: str, scales: Tensor, shape: Sequence[int]) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    *experts, outputs, inputs = shape
    found = list(scales.shape)
    if experts and found[:1] == experts:
        found = found[1:]
    if len(found) < 2 and found != [outputs] and prod(found) <= MOST_MERGED:
        return (0, 0)
    if len(found) < 2:
        found = [*found, 1]
    if len(found) > 2:
        raise NotInDialectError(f"scales of shape {tuple(scales.shape)} are for no weight of {tuple(shape)}")
    rows, columns = reversed(found) if name in INPUTS_FIRST else found
    return _extent(outputs, rows), _extent(inputs, columns)


def _extent(extent: int, count: int) -> int:
    """How many of ``extent`` share each of ``count`` scales; 0 is all."""
    if count == 1:
        return 0
    if -(-extent // USUAL_BLOCK) == count:
        return USUAL_BLOCK
    if extent % count:
        raise NotInDialectError(f"{count} scales are not for equal parts of {extent}")
    return extent // count
