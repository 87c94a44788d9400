"""A small vocabulary over the MLIR builders, so that kernel generators read like their algorithms.

Every function emits at the current insertion point. Addresses are ``!llvm.ptr`` with byte offsets,
counts and offsets are i64, and wherever an integer value is expected a Python int will do.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import TypeAlias

from llmir.ir.bindings import arith, ir, llvm, scf
from llmir.targets.x86.isa import INSTRUCTION_SETS

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
