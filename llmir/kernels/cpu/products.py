"""How one instruction set multiplies one element type: the part of attention that differs by machine.

Attention is two products, query x key and probability x value. Both are accumulated in float32, one
*step* of the reduction at a time: a step covers one element, or a pair where the machine has a dot
product of bf16 pairs. Scratch holds queries and probabilities so that a step is always four bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmir.ir.bindings import ir, x86
from llmir.ir.signature import ELEMENT_BYTES, LANES, KernelSpec
from llmir.kernels.cpu import builder as b

#: 2**f on [-1/2, 1/2], highest power first: Lawson fits to the relative error, at worst 1.0e-4, 2.8e-6 and
#: 1.1e-7. Probabilities are rounded to 2e-3 (bf16) or 2.4e-4 (f16) afterwards, so a short polynomial is enough.
#: 2**0 is exactly 1: a chunk that does not raise the maximum must leave the sums before it as they are, or the
#: oldest of many chunks loses weight.
EXP2_COEFFICIENTS = {
    "bf16": (0.0550089329, 0.242210969, 0.693282902, 1.0),
    "f16": (0.00958285294, 0.0559064262, 0.240240991, 0.693124175, 1.0),
    "f32": (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0),
}
#: Below this power of two a float32 is zero anyway; keeps the exponent arithmetic in range.
_LEAST_EXPONENT = -126.0
STEP_BYTES = 4


@dataclass(frozen=True)
class Products:
    """Emits loads, dot products and exponentials for one element type on one instruction set."""

    element_type: str
    isa: str

    @classmethod
    def of(cls, spec: KernelSpec) -> Products:
        """The arithmetic a kernel is made with."""
        return cls(spec.signature.element_type, spec.isa)

    @property
    def pairs(self) -> bool:
        """Whether a reduction step is a dot product of bf16 pairs."""
        return self.isa == "avx512_bf16" and self.element_type == "bf16"

    @property
    def layout(self) -> str:
        """The layout (see AttentionSignature) these products read: of a page, or of what is gathered from rows."""
        return "pair" if self.pairs else "lane"

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector."""
        return LANES[self.isa]

    @property
    def elements_per_step(self) -> int:
        """Elements of the reduction dimension one step covers."""
        return 2 if self.pairs else 1

    @property
    def element_bytes(self) -> int:
        """Bytes of a cache element."""
        return ELEMENT_BYTES[self.element_type]

    @property
    def step_vector_bytes(self) -> int:
        """Bytes of one step's keys (or values) across a vector."""
        return self.lanes * self.elements_per_step * self.element_bytes

    def f32_vector(self) -> ir.Type:
        """A vector of scores, probabilities or outputs."""
        return b.vector_of(self.lanes, b.floating("f32"))

    def element_vector(self) -> ir.Type:
        """A vector's worth of one step as it lies in the cache."""
        return b.vector_of(self.lanes * self.elements_per_step, b.floating(self.element_type))

    # -- operands of the dot product

    def load_step(self, address: ir.Value) -> ir.Value:
        """One step of keys or values, ready to be multiplied."""
        raw = b.load(address, self.element_vector(), alignment=self.step_vector_bytes)
        return raw if self.pairs else b.to_float(raw, self.lanes)

    def load_half_step(self, address: ir.Value) -> ir.Value:
        """One pair of values whose second element may be unwritten memory, which then reads as zero.

        A probability of zero does not protect: zero times a stale NaN is NaN.
        """
        words = b.vector_of(self.lanes, b.integer(32))
        raw = b.load(address, words, alignment=self.step_vector_bytes)
        return b.bitcast(b.both(raw, b.constant(0xFFFF, words)), self.element_vector())

    def load_broadcast(self, address: ir.Value) -> ir.Value:
        """One step of a query or of probabilities from scratch, in every lane."""
        if not self.pairs:
            return b.splat(b.load(address, b.floating("f32")), self.lanes)
        word = b.load(address, b.integer(32), alignment=STEP_BYTES)
        return b.bitcast(b.splat(word, self.lanes), self.element_vector())

    def dot(self, accumulator: ir.Value, broadcast: ir.Value, step: ir.Value) -> ir.Value:
        """``accumulator + broadcast * step``, summed within a pair."""
        if self.pairs:
            return x86.avx512_dot(accumulator, broadcast, step)
        return b.fma(broadcast, step, accumulator)

    # -- scratch

    def store_scratch(self, values: ir.Value, address: ir.Value) -> None:
        """A vector of float32 as reduction operands: rounded to bf16 for pairs, else as it is."""
        bytes_ = self.lanes * STEP_BYTES // self.elements_per_step
        b.store(self.round(values) if self.pairs else values, address, alignment=bytes_)

    def copy_query(self, source: ir.Value, scratch: ir.Value) -> None:
        """One vector of query elements into scratch."""
        type_ = b.vector_of(self.lanes, b.floating(self.element_type))
        raw = b.load(source, type_, alignment=self.element_bytes)
        bytes_ = self.lanes * STEP_BYTES // self.elements_per_step
        b.store(raw if self.pairs else b.to_float(raw, self.lanes), scratch, alignment=bytes_)

    def round(self, values: ir.Value) -> ir.Value:
        """float32 to the cache's element type, to nearest even."""
        type_ = b.vector_of(self.lanes, b.floating(self.element_type))
        if self.pairs:
            return x86.avx512_cvt_packed_f32_to_bf16(type_, values)
        return b.from_float(values, type_)

    # -- exponential

    def exp2(self, x: ir.Value) -> ir.Value:
        """``2**x`` for x <= 0 or moderately above."""
        type_ = self.f32_vector()
        avx512 = self.isa != "plain"
        if not avx512:
            x = b.fmax(x, b.constant(_LEAST_EXPONENT, type_))
        whole = b.round_even(x)
        fraction = b.fsub(x, whole)
        first, *rest = EXP2_COEFFICIENTS[self.element_type]
        result = b.constant(first, type_)
        for coefficient in rest:
            result = b.fma(result, fraction, b.constant(coefficient, type_))
        if avx512:
            every_lane, current_rounding = b.constant(-1, b.integer(16)), b.constant(4, b.integer(32))
            # The op's operands are the intrinsic's in another order: what is scaled comes last of the three.
            return x86.avx512_mask_scalef(result, whole, result, every_lane, current_rounding)
        return b.add_to_exponent(result, whole, self.lanes)
