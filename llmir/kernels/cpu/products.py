"""How one instruction set multiplies one element type: the part of attention that differs by machine.

Attention is two products, query x key and probability x value. Both are accumulated in float32, one
*step* of the reduction at a time: a step covers one element, or in pages of layout "pair" two neighbouring ones. A pair
is multiplied by the dot product of bfloat16 pairs where the machine has one, else widened to two float32. Scratch holds
queries and probabilities as the products want them: pairs of bfloat16, or float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from llmir.ir.bindings import ir, x86
from llmir.ir.cache_format import packed_layout
from llmir.ir.dtypes import DTYPES
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.targets.x86.isa import INSTRUCTION_SETS, InstructionSet

#: 2**f on [-1/2, 1/2], highest power first: Lawson fits to the relative error, at worst 1.0e-4, 2.8e-6 and
#: 1.1e-7. Outputs are rounded to 2e-3 (bf16) or 2.4e-4 (f16) afterwards, so a short polynomial is enough.
#: 2**0 is exactly 1: a chunk that does not raise the maximum must leave the sums before it as they are, or the
#: oldest of many chunks loses weight.
EXP2_COEFFICIENTS = {
    "bf16": (0.0550089329, 0.242210969, 0.693282902, 1.0),
    "f16": (0.00958285294, 0.0559064262, 0.240240991, 0.693124175, 1.0),
    "f32": (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004, 1.0),
}
#: Keeps exponents finite and in range. Of this one the arithmetic makes exactly zero, whatever is below: a masked key's
#: weight; the instruction that scales makes it of the other, below the least denormal.
_LEAST_EXPONENT, _LEAST_SCALED = -127.0, -200.0
_F32_BYTES = 4

#: One step of one operand in registers: a vector for each product that it takes part in.
Operand: TypeAlias = tuple[ir.Value, ...]


class Part(NamedTuple):
    """What of a step of values is loaded as one vector."""

    filled: int
    """Lanes; the others are 0."""
    alignment: int
    """Bytes."""


@dataclass(frozen=True)
class Products:
    """Emits loads, dot products and exponentials for one element type on one instruction set."""

    element_type: str
    isa: str

    @classmethod
    def of(cls, spec: KernelSpec) -> Products:
        """The arithmetic a kernel is made with."""
        return cls(spec.attention.dtype, spec.isa)

    @property
    def instructions(self) -> InstructionSet:
        """What the machine can do."""
        return INSTRUCTION_SETS[self.isa]

    @property
    def layout(self) -> str:
        """The layout (see AttentionSpec) these products read: of a page, or of what is gathered from rows."""
        return packed_layout(self.element_type)

    @property
    def pairs(self) -> bool:
        """Whether a reduction step is a pair of elements."""
        return self.layout == "pair"

    @property
    def dots_pairs(self) -> bool:
        """Whether a pair is multiplied by one instruction."""
        return self.pairs and self.instructions.multiplies_pairs

    @property
    def lanes(self) -> int:
        """float32 lanes of a vector."""
        return self.instructions.lanes

    @property
    def elements_per_step(self) -> int:
        """Elements of the reduction dimension one step covers."""
        return 2 if self.pairs else 1

    @property
    def element_bytes(self) -> int:
        """Bytes of a cache element."""
        return DTYPES[self.element_type].bytes_of(1)

    @property
    def step_vector_bytes(self) -> int:
        """Bytes of one step's keys (or values) across a vector."""
        return self.lanes * self.elements_per_step * self.element_bytes

    @property
    def step_scratch_bytes(self) -> int:
        """Bytes of one step of a query or of probabilities in scratch."""
        return self.scratch_bytes(self.elements_per_step)

    def scratch_bytes(self, elements: int) -> int:
        """Bytes of ``elements`` elements of a query or of probabilities in scratch."""
        return elements * (self.element_bytes if self.dots_pairs else _F32_BYTES)

    def f32_vector(self) -> ir.Type:
        """A vector of scores, probabilities or outputs."""
        return b.vector_of(self.lanes, b.floating("f32"))

    def operand_vector(self) -> ir.Type:
        """A vector as it is multiplied."""
        return self.element_vector() if self.dots_pairs else self.f32_vector()

    def element_vector(self) -> ir.Type:
        """A vector's worth of one step as it lies in the cache."""
        return b.vector_of(self.lanes * self.elements_per_step, b.floating(self.element_type))

    # -- operands of the dot product

    def load_step(self, address: ir.Value, part: Part | None = None) -> Operand:
        """One step of keys, or of values the ``part``, ready to be multiplied."""
        filled, alignment = part or self._whole
        if self.pairs and not self.dots_pairs:
            return f.widened_pair(self._load_words(address, filled, alignment), self.lanes)
        if self.pairs and filled < self.lanes:
            return (f.bitcast(self._load_words(address, filled, alignment), self.element_vector()),)
        lanes = filled * self.elements_per_step
        raw = b.load(address, b.vector_of(lanes, b.floating(self.element_type)), alignment=alignment)
        return (raw if self.dots_pairs else f.to_float(f.padded_with_zeros(raw, self.lanes), self.lanes),)

    def load_half_step(self, address: ir.Value, part: Part) -> Operand:
        """One pair of values whose second element may be unwritten memory, which then reads as zero.

        A probability of zero does not protect: zero times a stale NaN is NaN.
        """
        words = self._load_words(address, *part)
        if not self.dots_pairs:
            lower, _ = f.widened_pair(words, self.lanes)
            return (lower, b.constant(0.0, self.f32_vector()))
        return (f.bitcast(b.both(words, b.constant(0xFFFF, words.type)), self.element_vector()),)

    def add_products(self, sums: list[ir.Value], rows: Sequence[ir.Value], columns: Sequence[Operand]) -> None:
        """``sums[row, column] += row * column`` for one step, in place.

        ``rows``: addresses in scratch of a step of each row's query or probabilities; ``columns``: steps of keys or
        values. One element of a widened pair after the other: so a sum waits for all others before it is added to
        again, and fewer operands are alive.
        """
        for part in range(len(columns[0])):
            for r, address in enumerate(rows):
                factor = self._load_broadcast(b.offset(address, part * _F32_BYTES))
                for c, column in enumerate(columns):
                    i = r * len(columns) + c
                    sums[i] = self.dot(sums[i], factor, column[part])

    def _load_broadcast(self, address: ir.Value) -> ir.Value:
        """One element, or one pair for a dot product, of a query or of probabilities from scratch, in every lane."""
        if not self.dots_pairs:
            return f.splat(b.load(address, b.floating("f32")), self.lanes)
        word = b.load(address, b.integer(32), alignment=self.step_scratch_bytes)
        return f.bitcast(f.splat(word, self.lanes), self.element_vector())

    def dot(self, accumulator: ir.Value, broadcast: ir.Value, step: ir.Value) -> ir.Value:
        """``accumulator + broadcast * step``, summed within a pair."""
        if self.dots_pairs:
            return x86.avx512_dot(accumulator, broadcast, step)
        return f.fma(broadcast, step, accumulator)

    @property
    def _whole(self) -> Part:
        return Part(self.lanes, self.step_vector_bytes)

    def _load_words(self, address: ir.Value, filled: int, alignment: int) -> ir.Value:
        """One step of pairs as words of 32 bits."""
        words = b.load(address, b.vector_of(filled, b.integer(32)), alignment=alignment)
        return f.padded_with_zeros(words, self.lanes)

    # -- scratch

    def store_scratch(self, values: ir.Value, address: ir.Value) -> None:
        """A vector of float32 as reduction operands: rounded to bfloat16 for dot products of pairs, else as it is."""
        b.store(self.round(values) if self.dots_pairs else values, address, alignment=self.scratch_bytes(self.lanes))

    def copy_query(self, source: ir.Value, filled: int, scratch: ir.Value, scale: float) -> None:
        """One vector of query elements into scratch, times ``scale`` where that loses nothing: see :meth:`scaled`.

        ``filled`` of them, and zeros.
        """
        type_ = b.vector_of(filled, b.floating(self.element_type))
        values = f.padded_with_zeros(b.load(source, type_, alignment=self.element_bytes), self.lanes)
        if not self.dots_pairs:
            values = f.fmul(f.to_float(values, self.lanes), b.constant(scale, self.f32_vector()))
        b.store(values, scratch, alignment=self.scratch_bytes(self.lanes))

    def scaled(self, score: ir.Value, scale: float) -> ir.Value:
        """A product of a key and a query that :meth:`copy_query` copied, times ``scale``."""
        return f.fmul(score, b.constant(scale, self.f32_vector())) if self.dots_pairs else score

    def round(self, values: ir.Value) -> ir.Value:
        """float32 to the cache's element type, to nearest even; bfloat16's instruction takes denormals for zero."""
        type_ = b.vector_of(self.lanes, b.floating(self.element_type))
        if self.element_type != "bf16":
            return f.from_float(values, type_)
        if self.instructions.multiplies_pairs:
            return x86.avx512_cvt_packed_f32_to_bf16(type_, values)
        return f.round_to_bf16(values, self.lanes)

    # -- exponential

    def exp2(self, x: ir.Value) -> ir.Value:
        """``2**x`` for x <= 0 or moderately above; NaN stays NaN, and -inf gives 0."""
        type_ = self.f32_vector()
        x = f.fmax(b.constant(_LEAST_SCALED if self.instructions.scales else _LEAST_EXPONENT, type_), x)
        whole = f.round_even(x)
        fraction = f.fsub(x, whole)
        first, *rest = EXP2_COEFFICIENTS[self.element_type]
        result = b.constant(first, type_)
        for coefficient in rest:
            result = f.fma(result, fraction, b.constant(coefficient, type_))
        if self.instructions.scales:
            every_lane, current_rounding = b.constant(-1, b.integer(16)), b.constant(4, b.integer(32))
            # The op's operands are the intrinsic's in another order: what is scaled comes last of the three.
            return x86.avx512_mask_scalef(result, whole, result, every_lane, current_rounding)
        return f.add_to_exponent(result, whole, self.lanes)


def in_chains(sums: Sequence[ir.Value], chains: int) -> list[list[ir.Value]]:
    """The sums that a loop carries, chain by chain."""
    count = len(sums) // chains
    return [list(sums[i * count : (i + 1) * count]) for i in range(chains)]


def joined(sums: Sequence[ir.Value], chains: int) -> list[ir.Value]:
    """The results of which each chain holds a part."""
    total, *others = in_chains(sums, chains)
    for other in others:
        total = [f.fadd(one, two) for one, two in zip(total, other, strict=True)]
    return total
