"""From a kernel's specification to object code: level-two IR, the LLVM dialect, an ELF object."""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

from llmir.errors import KernelError
from llmir.ir.bindings import execution_engine, ir, passmanager
from llmir.ir.kernel_spec import KernelSpec
from llmir.ir.ranges import spec_problems
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.abi import ARGUMENT_OFFSET, ITEM_BYTES
from llmir.kernels.cpu.append import AppendEmitter
from llmir.kernels.cpu.attention import AttentionEmitter
from llmir.kernels.cpu.fields import argument, count_argument, item_field
from llmir.kernels.work_list import Item

#: From vector, scf, arith, math and x86 ops to the LLVM dialect.
PIPELINE = (
    "builtin.module(canonicalize,cse,loop-invariant-code-motion,convert-scf-to-cf,"
    "convert-vector-to-llvm{enable-x86=true},convert-arith-to-llvm,convert-math-to-llvm,convert-index-to-llvm,"
    "convert-cf-to-llvm,convert-func-to-llvm,reconcile-unrealized-casts,canonicalize,cse)"
)


def check(spec: KernelSpec) -> None:
    """Raises KernelError where the generators cannot make ``spec``."""
    if problems := spec_problems(spec):
        raise KernelError(f"no kernel {spec.symbol} can be made: {'; '.join(problems)}")


def kernel_module(spec: KernelSpec) -> ir.Module:
    """The level-two module of a kernel: ``append_kv`` and attention of one spec in one function.

    Raises KernelError where ``spec`` cannot be generated. Needs no context: it makes its own.
    """
    check(spec)
    with ir.Context(), ir.Location.unknown():
        module = ir.Module.create()
        for variant in spec.cpu_variants:
            emitter = AttentionEmitter(spec, variant)
            name = f"{spec.symbol}_{variant.name}"
            b.function(module, spec.isa, name, [b.pointer(), b.pointer()], emitter.emit_item)
        b.function(module, spec.isa, f"{spec.symbol}_thread", [b.pointer()], lambda a: _thread(spec, a))
        b.function(module, spec.isa, spec.symbol, [b.pointer()], lambda a: _entry(spec, a))
        return module


def _entry(spec: KernelSpec, arguments: ir.Value) -> None:
    """Starts the team: one parallel region for the whole call."""
    b.store(b.constant(0), b.offset(arguments, ARGUMENT_OFFSET["next_item"]))
    threads = b.narrow(count_argument(arguments, "threads"))
    body = b.address_of(f"{spec.symbol}_thread")
    b.call_address(argument(arguments, "gomp_parallel"), body, arguments, threads, b.constant(0, b.integer(32)))


def _thread(spec: KernelSpec, arguments: ir.Value) -> None:
    """What each thread does: append its share, wait for the others, then take items until none is left."""

    def append() -> None:
        i32 = b.integer(32)
        thread = b.widen(b.call_address(argument(arguments, "omp_get_thread_num"), result=i32))
        threads = b.widen(b.call_address(argument(arguments, "omp_get_num_threads"), result=i32))
        AppendEmitter(spec).emit(arguments, thread, threads)
        b.call_address(argument(arguments, "gomp_barrier"))

    b.when(b.less(0, count_argument(arguments, "append_tokens")), append)
    count = count_argument(arguments, "item_count")
    items = argument(arguments, "items")
    next_item = b.offset(arguments, ARGUMENT_OFFSET["next_item"])

    def take() -> ir.Value:
        number = b.atomic_add(next_item, 1)
        left = b.less(number, count)

        def run() -> None:
            item = b.offset(items, b.mul(number, ITEM_BYTES))
            kind = item_field(item, Item.VARIANT)
            for index, variant in enumerate(spec.cpu_variants):
                name = f"{spec.symbol}_{variant.name}"
                b.when(b.equal(kind, index), partial(b.call, name, arguments, item))

        b.when(left, run)
        return left

    b.loop_while(take)


def lower(module: ir.Module) -> None:
    """Lowers a level-two module to the LLVM dialect, in place."""
    with module.context:
        passmanager.PassManager.parse(PIPELINE).run(module.operation)


def compile_object(spec: KernelSpec) -> bytes:
    """The kernel as an x86-64 ELF object for exactly its instruction set; raises KernelError where that fails."""
    return object_code(kernel_module(spec), spec.symbol)


def object_code(module: ir.Module, name: str) -> bytes:
    """Lowers a level-two module in place and compiles it for its functions' own features; ``name`` is for the error."""
    lower(module)
    engine = execution_engine.ExecutionEngine(module, opt_level=3, enable_object_dump=True)
    with tempfile.TemporaryDirectory(prefix="llmir-") as folder:
        path = os.path.join(folder, "kernel.o")
        engine.dump_to_object_file(path)
        data = Path(path).read_bytes() if os.path.exists(path) else b""
    if not data:
        raise KernelError(f"MLIR wrote no object for kernel {name}; its messages above say why")
    return data
