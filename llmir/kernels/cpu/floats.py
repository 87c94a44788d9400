"""Numbers in vectors, for kernel generators: floating-point arithmetic, lanes, and the way between element types.

As in builder.py, every function emits at the current insertion point.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmir.ir.bindings import arith, ir, llvm, math, vector
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.builder import Value


def splat(x: Value, lanes: int) -> Value:
    """``x`` in every lane."""
    return vector.broadcast(b.vector_of(lanes, x.type), x)


def bitcast(x: Value, type_: ir.Type) -> Value:
    """The same bits, read as another vector type."""
    return vector.bitcast(type_, x)


def interleave(x: Value, y: Value) -> Value:
    """``[x0, y0, x1, y1, ...]``."""
    return vector.interleave(x, y)


def shuffle(x: Value, y: Value, places: Sequence[int]) -> Value:
    """The lanes of ``x`` followed by those of ``y``, taken at ``places``."""
    return vector.shuffle(x, y, list(places))


def padded_with_zeros(x: Value, lanes: int) -> Value:
    """``x`` as the first of ``lanes`` lanes, the others 0."""
    own = x.type.shape[0]
    if own == lanes:
        return x
    nothing = b.constant(0, x.type)
    return vector.shuffle(x, nothing, [min(lane, own) for lane in range(lanes)])


def first_lanes(x: Value, count: int) -> Value:
    """The first ``count`` lanes of ``x``."""
    if x.type.shape[0] == count:
        return x
    # vector.shuffle of one vector twice becomes one of it and ub.poison, of which the bindings make no LLVM IR.
    places = ir.DenseI32ArrayAttr.get(list(range(count)))
    return llvm.shufflevector(b.vector_of(count, x.type.element_type), x, x, places)


def fma(x: Value, y: Value, z: Value) -> Value:
    """``x * y + z``, rounded once."""
    return vector.fma(x, y, z)


def fadd(x: Value, y: Value) -> Value:
    """``x + y``."""
    return arith.addf(x, y)


def fsub(x: Value, y: Value) -> Value:
    """``x - y``."""
    return arith.subf(x, y)


def fmul(x: Value, y: Value) -> Value:
    """``x * y``."""
    return arith.mulf(x, y)


def fdiv(x: Value, y: Value) -> Value:
    """``x / y``."""
    return arith.divf(x, y)


def fmax(x: Value, y: Value) -> Value:
    """The larger, and ``y`` where either is NaN: just what x86's instruction does, unlike those of IEEE 754."""
    return arith.select(arith.cmpf(arith.CmpFPredicate.OGT, x, y), x, y)


def negate(x: Value) -> Value:
    """``-x``."""
    return arith.negf(x)


def magnitude(x: Value) -> Value:
    """``|x|``."""
    return math.absf(x)


def with_sign_of(x: Value, sign: Value) -> Value:
    """``|x|`` with the sign of ``sign``."""
    return math.copysign(x, sign)


def round_even(x: Value) -> Value:
    """To the nearest integer, ties to even."""
    return math.roundeven(x)


def widest(x: Value, lanes: int) -> Value:
    """The largest lane, in every lane; where a lane is NaN, any of them."""
    distance = lanes // 2
    while distance:
        # vector.shuffle of one vector twice becomes one of it and ub.poison, of which the bindings make no LLVM IR.
        others = ir.DenseI32ArrayAttr.get([lane ^ distance for lane in range(lanes)])
        x = fmax(x, llvm.shufflevector(x.type, x, x, others))
        distance //= 2
    return x


def total(x: Value) -> Value:
    """The sum of the lanes in any order, a scalar."""
    return vector.reduction(x.type.element_type, vector.CombiningKind.ADD, x, fastmath=arith.FastMathFlags.reassoc)


def float_of(x: Value, lanes: int) -> Value:
    """i32 lanes to the nearest float32."""
    return arith.sitofp(b.vector_of(lanes, b.floating("f32")), x)


def to_float(x: Value, lanes: int) -> Value:
    """16-bit floats to float32; float32 as it is."""
    f32 = b.vector_of(lanes, b.floating("f32"))
    return x if x.type == f32 else arith.extf(f32, x)


def from_float(x: Value, type_: ir.Type) -> Value:
    """float32 to ``type_``, rounded to nearest even."""
    return x if x.type == type_ else arith.truncf(type_, x)


def round_to_bf16(x: Value, lanes: int) -> Value:
    """float32 to bfloat16, to nearest even, in integer arithmetic; NaN stays NaN.

    The upper half is rounded by adding just under half of its last place, and one more where it is odd. A NaN could
    so become infinite or overflow into the sign: its quiet bit is set instead.
    """
    i32, last_place, quiet_nan = b.vector_of(lanes, b.integer(32)), 1 << 16, 1 << 22
    bits = bitcast(x, i32)
    odd = b.both(arith.shrui(bits, b.constant(16, i32)), b.constant(1, i32))
    rounded = b.add(b.add(bits, b.constant(last_place // 2 - 1, i32)), odd)
    is_nan = arith.cmpf(arith.CmpFPredicate.UNO, x, x)
    kept = b.select(is_nan, b.either(bits, b.constant(quiet_nan, i32)), rounded)
    upper = arith.trunci(b.vector_of(lanes, b.integer(16)), arith.shrui(kept, b.constant(16, i32)))
    return bitcast(upper, b.vector_of(lanes, b.floating("bf16")))


def add_to_exponent(x: Value, power: Value, lanes: int) -> Value:
    """``x * 2**power`` for whole float32 powers that keep the result normal; 1 * 2**-127 is 0, and NaN stays NaN.

    x86 converts NaN to the least integer, of which the shift leaves nothing.
    """
    i32 = b.vector_of(lanes, b.integer(32))
    mantissa_bits = b.constant(23, i32)
    shifted = arith.shli(arith.fptosi(i32, power), mantissa_bits)
    return bitcast(arith.addi(bitcast(x, i32), shifted), x.type)


def widened_pair(x: Value, lanes: int) -> tuple[Value, Value]:
    """Of every i32 lane the bfloat16 in its lower half, and the one in its upper half, as float32."""
    f32 = b.vector_of(lanes, b.floating("f32"))
    lower, upper = arith.shli(x, b.constant(16, x.type)), b.both(x, b.constant(-0x10000, x.type))
    return bitcast(lower, f32), bitcast(upper, f32)


def halves(x: Value, lanes: int) -> tuple[Value, Value]:
    """The lower and the upper 16 bits of every i32 lane, as i16."""
    type_ = b.vector_of(lanes, b.integer(16))
    upper = arith.shrui(x, b.constant(16, x.type))
    return arith.trunci(type_, x), arith.trunci(type_, upper)
