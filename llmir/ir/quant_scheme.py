"""How a quantized weight is stored: numbers of few bits, and a scale for each block of them.

Needs neither MLIR nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from llmir.ir.dtypes import DTYPES, WEIGHT_STORAGE

#: What scales are kept in, and what zero points.
SCALES = ("f32", "f16", "bf16", "f8E4M3FN", "f8E8M0FNU")
ZERO_POINTS = ("", "i4", "i8")


@dataclass(frozen=True)
class QuantScheme:
    """One way of storing weights ``[outputs, inputs]``, or ``[experts, outputs, inputs]``.

    Each number stands for ``scale * (number - zero point)``. A block at an edge may be smaller than the others.
    """

    method: str
    """What the frameworks call it: ``awq``, ``gptq``, ``compressed-tensors``, ``fp8``, ``mxfp4`` ..."""
    storage: str
    """Element type of the numbers."""
    block: tuple[int, int]
    """Outputs and inputs that share a scale; 0 is all of them, so (0, 0) is a scale for the tensor or the expert."""
    scale: str
    """Element type of the scales."""
    zero_point: str = ""
    """Element type of the zero points, one a scale; none if empty."""

    def scales(self, shape: Sequence[int]) -> int:
        """How many scales a weight of this shape has."""
        *experts, outputs, inputs = shape
        per_expert = prod(
            -(-extent // size) if size else 1 for extent, size in zip((outputs, inputs), self.block, strict=True)
        )
        return prod(experts) * per_expert

    def stored_bytes(self, shape: Sequence[int]) -> float:
        """Bytes of a weight of this shape with its scales and zero points."""
        beside = DTYPES[self.scale].bits + (DTYPES[self.zero_point].bits if self.zero_point else 0)
        return (prod(shape) * DTYPES[self.storage].bits + self.scales(shape) * beside) / 8

    def problem(self) -> str | None:
        """What is wrong with the record, in words."""
        kinds = {
            "numbers": (self.storage, WEIGHT_STORAGE),
            "scales": (self.scale, SCALES),
            "zero points": (self.zero_point, ZERO_POINTS),
        }
        for what, (found, known) in kinds.items():
            if found not in known:
                names = ", ".join(name or "none" for name in known)
                return f"{what} of a quantized tensor are of type {names}, not {found or 'none'}"
        if not self.method:
            return "the method of a quantized tensor must have a name"
        if min(self.block) < 0:
            return f"a block of a quantized tensor cannot be of {self.block[0]} by {self.block[1]}"
        return None
