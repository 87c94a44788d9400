"""A small vocabulary over the MLIR builders, so that kernel generators read like their algorithms.

Every function emits at the current insertion point. Addresses are ``!llvm.ptr`` with byte offsets,
counts and offsets are i64, and wherever an integer value is expected a Python int will do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from llmir.ir.bindings import arith, ir, llvm, math, scf, vector
from llmir.ir.instruction_sets import INSTRUCTION_SETS

Value: TypeAlias = ir.Value
Integer: TypeAlias = Value | int
POINTER_BYTES = 8

_DYNAMIC_INDEX = -(2**31)  # llvm.getelementptr's mark for "this index is an operand"
#: LLVM's name of the processors that have nothing beyond what every x86-64 processor has.
_BASELINE = "x86-64"


# -- types ------------------------------------------------------------------------------------------


def integer(bits: int) -> ir.Type:
    """The signless integer type of ``bits`` bits."""
    return ir.IntegerType.get_signless(bits)


def floating(name: str) -> ir.Type:
    """The scalar type called "bf16", "f16" or "f32"."""
    return ir.Type.parse(name)


def pointer() -> ir.Type:
    """An opaque address."""
    return ir.Type.parse("!llvm.ptr")


def vector_of(lanes: int, element: ir.Type) -> ir.Type:
    """A vector of ``lanes`` elements."""
    return ir.VectorType.get([lanes], element)


# -- constants and integers -------------------------------------------------------------------------


def constant(value: int | float, type_: ir.Type | None = None) -> Value:
    """A scalar, or a vector with ``value`` in every lane; i64 unless told otherwise."""
    type_ = type_ or integer(64)
    if isinstance(type_, ir.VectorType):
        element = type_.element_type
        attribute = ir.DenseElementsAttr.get_splat(type_, _scalar_attribute(element, value))
        return arith.constant(type_, attribute)
    return arith.constant(type_, _scalar_attribute(type_, value))


def _scalar_attribute(type_: ir.Type, value: int | float) -> ir.Attribute:
    if isinstance(type_, ir.IntegerType):
        return ir.IntegerAttr.get(type_, int(value))
    return ir.FloatAttr.get(type_, float(value))


def lane_numbers(lanes: int) -> Value:
    """``[0, 1, ..., lanes - 1]`` as a vector of i32."""
    type_ = vector_of(lanes, integer(32))
    data = struct.pack(f"<{lanes}i", *range(lanes))
    return arith.constant(type_, ir.DenseElementsAttr.get(memoryview(data), type=type_))


def _value(x: Integer) -> Value:
    return constant(x) if isinstance(x, int) else x


def _same(a: Integer, b: Integer) -> tuple[Value, Value]:
    """Both as values; a Python int takes the other's type."""
    if isinstance(a, int) and not isinstance(b, int):
        return constant(a, b.type), b
    if isinstance(b, int) and not isinstance(a, int):
        return a, constant(b, a.type)
    return _value(a), _value(b)


def add(a: Integer, b: Integer) -> Value:
    """``a + b``."""
    return arith.addi(*_same(a, b))


def sub(a: Integer, b: Integer) -> Value:
    """``a - b``."""
    return arith.subi(*_same(a, b))


def mul(a: Integer, b: Integer) -> Value:
    """``a * b``."""
    return arith.muli(*_same(a, b))


def div(a: Integer, b: Integer) -> Value:
    """``a / b`` of non-negative integers, rounded down."""
    return arith.divui(*_same(a, b))


def ceil_div(a: Integer, b: int) -> Value:
    """``a / b`` of non-negative integers, rounded up."""
    return div(add(a, b - 1), b)


def rem(a: Integer, b: Integer) -> Value:
    """The remainder of non-negative integers."""
    return arith.remui(*_same(a, b))


def maximum(a: Integer, b: Integer) -> Value:
    """The larger signed integer."""
    return arith.maxsi(*_same(a, b))


def minimum(a: Integer, b: Integer) -> Value:
    """The smaller signed integer."""
    return arith.minsi(*_same(a, b))


def less(a: Integer, b: Integer) -> Value:
    """``a < b``, signed; lane by lane on vectors."""
    return arith.cmpi(arith.CmpIPredicate.slt, *_same(a, b))


def at_least(a: Integer, b: Integer) -> Value:
    """``a >= b``, signed; lane by lane on vectors."""
    return arith.cmpi(arith.CmpIPredicate.sge, *_same(a, b))


def equal(a: Integer, b: Integer) -> Value:
    """``a == b``."""
    return arith.cmpi(arith.CmpIPredicate.eq, *_same(a, b))


def both(a: Value, b: Value) -> Value:
    """Bitwise and."""
    return arith.andi(a, b)


def either(a: Value, b: Value) -> Value:
    """Bitwise or."""
    return arith.ori(a, b)


def select(condition: Value, yes: Value, no: Value) -> Value:
    """``yes`` where ``condition`` holds, else ``no``; lane by lane on vectors."""
    return arith.select(condition, yes, no)


def widen(x: Value) -> Value:
    """i32 to i64, signed."""
    return arith.extsi(integer(64), x)


def narrow(x: Value) -> Value:
    """i64 to i32."""
    return arith.trunci(integer(32), x)


def widened_pair(x: Value, lanes: int) -> tuple[Value, Value]:
    """Of every i32 lane the bfloat16 in its lower half, and the one in its upper half, as float32."""
    f32 = vector_of(lanes, floating("f32"))
    lower, upper = arith.shli(x, constant(16, x.type)), both(x, constant(-0x10000, x.type))
    return bitcast(lower, f32), bitcast(upper, f32)


def halves(x: Value, lanes: int) -> tuple[Value, Value]:
    """The lower and the upper 16 bits of every i32 lane, as i16."""
    type_ = vector_of(lanes, integer(16))
    upper = arith.shrui(x, constant(16, x.type))
    return arith.trunci(type_, x), arith.trunci(type_, upper)


# -- memory -----------------------------------------------------------------------------------------


def offset(base: Value, by: Integer) -> Value:
    """The address ``by`` bytes after ``base``."""
    byte = integer(8)
    if isinstance(by, int):
        if by == 0:
            return base
        return llvm.getelementptr(pointer(), base, [], [by], byte, 0)
    return llvm.getelementptr(pointer(), base, [by], [_DYNAMIC_INDEX], byte, 0)


def load(address: Value, type_: ir.Type, alignment: int | None = None) -> Value:
    """The value at ``address``; ``alignment`` in bytes where it is not the type's own."""
    return llvm.load(type_, address, alignment=alignment)


def load_pointer(table: Value, number: Integer) -> Value:
    """Entry ``number`` of a table of addresses."""
    return load(offset(table, mul(number, POINTER_BYTES)), pointer())


def store(value: Value, address: Value, alignment: int | None = None) -> None:
    """Writes ``value`` at ``address``."""
    llvm.store(value, address, alignment=alignment)


def store_lanes(value: Value, address: Value, mask: Value, alignment: int) -> None:
    """Writes the lanes of ``value`` whose ``mask`` is set; the other bytes are not touched."""
    llvm.intr_masked_store(value, address, mask, alignment)


def prefetch(address: Value, locality: int) -> None:
    """Asks for the line at ``address``; locality 3 is the nearest cache, 1 the farthest."""
    llvm.intr_prefetch(address, rw=0, hint=locality, cache=1)


def stack_array(byte_count: int) -> Value:
    """Bytes on the stack of the running thread, aligned to a cache line."""
    return llvm.alloca(pointer(), constant(byte_count), integer(8), alignment=64)


def atomic_add(address: Value, amount: Integer, bits: int = 64) -> Value:
    """Adds to the integer at ``address`` and gives its old value; acquires and releases."""
    value = constant(amount, integer(bits)) if isinstance(amount, int) else amount
    return llvm.atomicrmw(llvm.AtomicBinOp.add, address, value, llvm.AtomicOrdering.acq_rel)


# -- floating point ---------------------------------------------------------------------------------


def splat(x: Value, lanes: int) -> Value:
    """``x`` in every lane."""
    return vector.broadcast(vector_of(lanes, x.type), x)


def bitcast(x: Value, type_: ir.Type) -> Value:
    """The same bits, read as another vector type."""
    return vector.bitcast(type_, x)


def interleave(a: Value, b: Value) -> Value:
    """``[a0, b0, a1, b1, ...]``."""
    return vector.interleave(a, b)


def shuffle(a: Value, b: Value, places: Sequence[int]) -> Value:
    """The lanes of ``a`` followed by those of ``b``, taken at ``places``."""
    return vector.shuffle(a, b, list(places))


def padded_with_zeros(x: Value, lanes: int) -> Value:
    """``x`` as the first of ``lanes`` lanes, the others 0."""
    own = x.type.shape[0]
    if own == lanes:
        return x
    nothing = constant(0, x.type)
    return vector.shuffle(x, nothing, [min(lane, own) for lane in range(lanes)])


def first_lanes(x: Value, count: int) -> Value:
    """The first ``count`` lanes of ``x``."""
    if x.type.shape[0] == count:
        return x
    # vector.shuffle of one vector twice becomes one of it and ub.poison, of which the bindings make no LLVM IR.
    places = ir.DenseI32ArrayAttr.get(list(range(count)))
    return llvm.shufflevector(vector_of(count, x.type.element_type), x, x, places)


def fma(a: Value, b: Value, c: Value) -> Value:
    """``a * b + c``, rounded once."""
    return vector.fma(a, b, c)


def fadd(a: Value, b: Value) -> Value:
    """``a + b``."""
    return arith.addf(a, b)


def fsub(a: Value, b: Value) -> Value:
    """``a - b``."""
    return arith.subf(a, b)


def fmul(a: Value, b: Value) -> Value:
    """``a * b``."""
    return arith.mulf(a, b)


def fdiv(a: Value, b: Value) -> Value:
    """``a / b``."""
    return arith.divf(a, b)


def fmax(a: Value, b: Value) -> Value:
    """The larger, and ``b`` where either is NaN: just what x86's instruction does, unlike those of IEEE 754."""
    return arith.select(arith.cmpf(arith.CmpFPredicate.OGT, a, b), a, b)


def negate(a: Value) -> Value:
    """``-a``."""
    return arith.negf(a)


def magnitude(a: Value) -> Value:
    """``|a|``."""
    return math.absf(a)


def with_sign_of(a: Value, sign: Value) -> Value:
    """``|a|`` with the sign of ``sign``."""
    return math.copysign(a, sign)


def round_even(a: Value) -> Value:
    """To the nearest integer, ties to even."""
    return math.roundeven(a)


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
    return arith.sitofp(vector_of(lanes, floating("f32")), x)


def to_float(x: Value, lanes: int) -> Value:
    """16-bit floats to float32; float32 as it is."""
    f32 = vector_of(lanes, floating("f32"))
    return x if x.type == f32 else arith.extf(f32, x)


def from_float(x: Value, type_: ir.Type) -> Value:
    """float32 to ``type_``, rounded to nearest even."""
    return x if x.type == type_ else arith.truncf(type_, x)


def round_to_bf16(x: Value, lanes: int) -> Value:
    """float32 to bfloat16, to nearest even, in integer arithmetic; NaN stays NaN.

    The upper half is rounded by adding just under half of its last place, and one more where it is odd. A NaN could
    so become infinite or overflow into the sign: its quiet bit is set instead.
    """
    i32, last_place, quiet_nan = vector_of(lanes, integer(32)), 1 << 16, 1 << 22
    bits = bitcast(x, i32)
    odd = both(arith.shrui(bits, constant(16, i32)), constant(1, i32))
    rounded = add(add(bits, constant(last_place // 2 - 1, i32)), odd)
    is_nan = arith.cmpf(arith.CmpFPredicate.UNO, x, x)
    kept = select(is_nan, either(bits, constant(quiet_nan, i32)), rounded)
    upper = arith.trunci(vector_of(lanes, integer(16)), arith.shrui(kept, constant(16, i32)))
    return bitcast(upper, vector_of(lanes, floating("bf16")))


def add_to_exponent(x: Value, power: Value, lanes: int) -> Value:
    """``x * 2**power`` for whole float32 powers that keep the result normal; 1 * 2**-127 is 0, and NaN stays NaN.

    x86 converts NaN to the least integer, of which the shift leaves nothing.
    """
    i32 = vector_of(lanes, integer(32))
    mantissa_bits = constant(23, i32)
    shifted = arith.shli(arith.fptosi(i32, power), mantissa_bits)
    return bitcast(arith.addi(bitcast(x, i32), shifted), x.type)


# -- control ----------------------------------------------------------------------------------------


def loop(
    lower: Integer,
    upper: Integer,
    step: Integer,
    body: Callable[..., Sequence[Value] | None],
    carried: Sequence[Value] = (),
) -> list[Value]:
    """``for index in range(lower, upper, step)``: ``carried = body(index, *carried)``; gives the last ``carried``."""
    for_op = scf.ForOp(_value(lower), _value(upper), _value(step), list(carried))
    with ir.InsertionPoint(for_op.body):
        result = body(for_op.induction_variable, *for_op.inner_iter_args)
        scf.yield_(list(result or ()))
    return list(for_op.results)


def when(condition: Value, body: Callable[[], None]) -> None:
    """Emits ``body`` under ``condition``."""
    if_op = scf.IfOp(condition)
    with ir.InsertionPoint(if_op.then_block):
        body()
        scf.yield_([])


def choose(condition: Value, yes: Callable[[], None], no: Callable[[], None]) -> None:
    """Emits ``yes`` under ``condition``, else ``no``."""
    if_op = scf.IfOp(condition, has_else=True)
    for block, body in ((if_op.then_block, yes), (if_op.else_block, no)):
        with ir.InsertionPoint(block):
            body()
            scf.yield_([])


def loop_while(condition_and_body: Callable[[], Value]) -> None:
    """Repeats until the condition that ``condition_and_body`` returns is false."""
    while_op = scf.WhileOp([], [])
    while_op.before.blocks.append()
    while_op.after.blocks.append()
    with ir.InsertionPoint(while_op.before.blocks[0]):
        scf.condition(condition_and_body(), [])
    with ir.InsertionPoint(while_op.after.blocks[0]):
        scf.yield_([])


def function(
    module: ir.Module, isa: str, name: str, argument_types: Sequence[ir.Type], body: Callable[..., None]
) -> None:
    """Adds ``void name(arguments)`` with the C calling convention, compiled for the features of ``isa`` and no others.

    Never inlined and never internal: the execution engine looks up every function by name.
    """
    type_ = ir.Type.parse(f"!llvm.func<void ({', '.join(str(t) for t in argument_types)})>")
    with ir.InsertionPoint(module.body):
        func = llvm.LLVMFuncOp(name, ir.TypeAttr.get(type_), no_inline=True)
    # Without both of these, LLVM takes whatever the compiling machine has.
    instructions = INSTRUCTION_SETS[isa]
    func.attributes["target_cpu"] = ir.StringAttr.get(_BASELINE)
    features = ", ".join(f'"+{feature}"' for feature in instructions.llvm_features)
    func.attributes["target_features"] = ir.Attribute.parse(f"#llvm.target_features<[{features}]>")
    # The baseline's order of instructions needs more registers than there are: prefill of float16 with AVX2 had 259
    # instructions for 96 multiply-adds, 91 of them moves, and has 168 and none.
    func.attributes["tune_cpu"] = ir.StringAttr.get(instructions.tuned_for)
    # Or LLVM makes calls of the C library out of loops and many stores: a kernel links to nothing.
    func.attributes["passthrough"] = ir.ArrayAttr.get([ir.StringAttr.get("no-builtins")])
    block = func.body.blocks.append(*argument_types)
    with ir.InsertionPoint(block):
        body(*block.arguments)
        llvm.ReturnOp()


def call(name: str, *arguments: Value) -> None:
    """Calls a function of this module that returns nothing."""
    llvm.CallOp(None, list(arguments), [], [], callee=name)


def call_address(address: Value, *arguments: Value, result: ir.Type | None = None) -> Value | None:
    """Calls the C function at ``address``."""
    op = llvm.CallOp(result, [address, *arguments], [], [])
    return op.results[0] if result is not None else None


def address_of(name: str) -> Value:
    """The address of a function of this module."""
    return llvm.mlir_addressof(pointer(), name)
