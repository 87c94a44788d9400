"""Does a kernel work on this machine? One small step of attention, compiled, run, and compared with the reference.

    python -m llmir.kernel_test bf16

A program of its own, because code that a machine cannot run ends the process: it prints the relative error, or says on
standard error why there is none.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llmir import compiler, workload
from llmir.child import python
from llmir.errors import KernelError, LlmirError
from llmir.ir.dtypes import DTYPES
from llmir.kernels import reference
from llmir.kernels.cpu.kernel import Kernel
from llmir.plan import PlannedKernel
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.step import Step
from llmir.targets.machine import Target

#: Relative error of a step that a float32 exponential costs.
_EXPONENTIAL_ERROR = 4e-6
_HEADS, _KV_HEADS, _HEAD_SIZE, _BLOCK_SIZE = 6, 2, 64, 16
#: Tokens in the cache and new ones, by request: decode over several blocks, a prompt that goes on, a short one.
_CACHED, _NEW = (100, 33, 0), (1, 20, 3)
_THREADS = 2
_TIMEOUT_SECONDS = 120.0


def most_error(dtype: str) -> float:
    """Largest relative error of a step: what rounding the output costs, or the exponentials."""
    return max(DTYPES[dtype].rounding, _EXPONENTIAL_ERROR)


def relative_error(dtype: str, target: Target) -> float:
    """The error of one step on ``target``, which is this machine, against float64.

    Raises LlmirError where the kernel cannot be compiled or loaded, or writes what it must not.
    """
    with tempfile.TemporaryDirectory(prefix="llmir-") as folder:
        planned = _planned(dtype, target, Path(folder))
        kernel = Kernel.load(planned.spec, compiler.object_cache(Path(folder)))
    return _step_error(CpuAttentionRunner(kernel, planned.policy))


def _planned(dtype: str, target: Target, folder: Path) -> PlannedKernel:
    """The kernel as the passes decide it, from published figures."""
    from llmir.ir.one_layer import LAYER, attention_module

    sizes = (_HEADS, _KV_HEADS, _HEAD_SIZE, _BLOCK_SIZE)
    module = attention_module("kernel test", dtype, *sizes, max_length=1024)
    options = compiler.Options(calibrate=False, cache=folder)
    return compiler.compile(module, target, workload.DEFAULT, options).kernel_for(LAYER)


def _step_error(runner: CpuAttentionRunner) -> float:
    """Appends and attends with random values; what must not be read is NaN."""
    spec, rng = runner.spec, np.random.default_rng()
    attention, dtype = spec.attention, spec.attention.dtype

    def encoded(*shape: int) -> np.ndarray:
        return reference.encode(rng.standard_normal(shape).astype(np.float32), dtype)

    seq_lens = np.array(_CACHED, np.int32) + np.array(_NEW, np.int32)
    query_start = np.concatenate([[0], np.cumsum(_NEW)]).astype(np.int32)
    tokens, columns = int(query_start[-1]), -(-int(seq_lens.max()) // _BLOCK_SIZE)
    blocks = len(seq_lens) * columns
    table = rng.permutation(blocks).astype(np.int32).reshape(len(seq_lens), columns)
    positions = [np.arange(length) for length in seq_lens]
    slots = [
        table[r, p // _BLOCK_SIZE].astype(np.int64) * _BLOCK_SIZE + p % _BLOCK_SIZE for r, p in enumerate(positions)
    ]
    nothing = np.full((blocks, _KV_HEADS, _BLOCK_SIZE, _HEAD_SIZE), np.nan, np.float32)
    caches = reference.encode(nothing, dtype), reference.encode(nothing, dtype)
    for request_slots, cached in zip(slots, _CACHED, strict=True):
        old = encoded(cached, _KV_HEADS, _HEAD_SIZE), encoded(cached, _KV_HEADS, _HEAD_SIZE)
        reference.append_kv(*old, request_slots[:cached], *caches)
    query = encoded(tokens, _HEADS, _HEAD_SIZE)
    key, value = encoded(tokens, _KV_HEADS, _HEAD_SIZE), encoded(tokens, _KV_HEADS, _HEAD_SIZE)
    new_slots = np.concatenate([s[c:] for s, c in zip(slots, _CACHED, strict=True)])
    output = reference.encode(np.full(query.shape, np.nan, np.float32), dtype)

    pages = _aligned(reference.pack_pages(*caches, attention.cache, spec.isa))
    runner.begin_step(Step(query_start, seq_lens, table), _THREADS)
    tensors = map(_address, (query, key, value, output))
    runner.attend(*tensors, pages.ctypes.data, new_slots.ctypes.data, tokens)  # type: ignore[arg-type, call-arg]

    reference.append_kv(key, value, new_slots, *caches)
    if pages.tobytes() != reference.pack_pages(*caches, attention.cache, spec.isa).tobytes():
        raise KernelError("new keys and values are not where they belong in the cache")
    exact = reference.attention(query, *caches, table, seq_lens, query_start, attention)
    return reference.relative_error(output, exact)


def _address(array: np.ndarray) -> tuple[int, int]:
    """Address and elements from one token to the next."""
    return array.ctypes.data, array.strides[0] // array.itemsize


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line, as a framework's cache does."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def in_own_process(dtype: str, openmp: str, command: Sequence[str] | None = None) -> float:
    """:func:`relative_error` of this machine's best instruction set, found by a process of its own.

    ``openmp``: the library with the OpenMP runtime. ``command``: what to run instead of this module. Raises KernelError
    that says how the process ended, or by how much the kernel is wrong.
    """
    command = command or python("-m", __name__)
    try:
        done = subprocess.run(
            [*command, dtype, openmp],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise KernelError(f"did not end within {_TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode < 0:
        raise KernelError(f"was ended by {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with exit code {done.returncode}"]
        raise KernelError(lines[-1])
    error = float(done.stdout)
    if not error <= most_error(dtype):  # NaN too
        raise KernelError(f"is wrong: relative error {error:.1e}, at most {most_error(dtype):.0e} is rounding")
    return error


def main() -> None:
    """The program: element type and OpenMP library are its arguments."""
    dtype, openmp = sys.argv[1:]
    ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)  # where torch would bring it
    try:
        print(relative_error(dtype, Target.detect()))  # type: ignore[arg-type]
    except LlmirError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
