"""GPU kernels compiled ahead of time: on any machine with Triton, for any GPU architecture, without a GPU.

Triton runs in child processes. One that serves may have its interpreter switched on, or none of its functions imported
yet; a crash of the compiler ends a child alone, and several children use several cores.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmir.child import python
from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.gpu import toolchain
from llmir.kernels.gpu.machine_code import MachineCode

WORKER = "llmir.kernels.gpu.ahead_worker"
#: Seconds for a program of a kernel, many times what the slowest takes.
PATIENCE = 600.0


@dataclass(frozen=True)
class Parameter:
    """A run-time parameter of a kernel function."""

    name: str
    type: str
    """Triton's name of it: ``*bf16`` is a pointer, ``i32`` an integer."""
    offset: int
    """In bytes from the beginning of the parameters."""
    bytes: int


@dataclass(frozen=True)
class Binary:
    """One program of a kernel compiled for one architecture, with what its machine code says about it."""

    program: str
    """"append", "decode", "prefill" or "merge"."""
    architecture: str
    entry: str
    """Name of the function in the binary."""
    content: bytes = field(repr=False)
    """A cubin, or an hsaco."""
    parameters: tuple[Parameter, ...]
    """In the order of a launch."""
    warps: int
    threads: int
    """Of a thread block."""
    stages: int
    shared_bytes: int
    """Dynamic shared memory of a thread block, to be asked for at launch."""
    scratch_bytes: int
    """Memory that a launch brings for each thread block, by the scratch pointers among the parameters."""
    tensor_columns: int
    """Columns of Blackwell's tensor memory that a thread block takes."""
    code: MachineCode
    resident_blocks: int
    """Thread blocks that a multiprocessor holds at a time, by registers, shared and tensor memory."""
    triton: str
    """The release that compiled it."""

    @property
    def suffix(self) -> str:
        """Ending of the binary's file name."""
        return ".cubin" if toolchain.backend(self.architecture) == "cuda" else ".hsaco"


@dataclass(frozen=True)
class Job:
    """One program of one kernel."""

    spec: KernelSpec
    program: str


def jobs(spec: KernelSpec) -> tuple[Job, ...]:
    """The programs of a kernel, in the order of programs.py; known without importing Triton."""
    return tuple(Job(spec, name) for name in ("append", *(v.name for v in spec.gpu_variants), "merge"))


def compile_ahead(
    specs: Sequence[KernelSpec], cache: Path, progress: Callable[[str], None] = lambda step: None
) -> list[tuple[Binary, ...]]:
    """The binaries of each of ``specs``, made in child processes; ``cache``: llmir's cache folder.

    ``progress`` is called with a few words before each program, from several threads. Raises KernelError where Triton
    is missing or of an unknown release, and where a program does not compile or does not fit its GPU.
    """
    toolchain.require()
    for spec in specs:
        toolchain.backend(spec.isa)
    todo = deque(dict.fromkeys(job for spec in specs for job in jobs(spec)))
    workers = max(1, min(len(os.sched_getaffinity(0)), len(todo)))
    made: dict[Job, Binary] = {}
    with ThreadPoolExecutor(workers) as threads:
        for part in [threads.submit(_work, todo, cache, progress) for _ in range(workers)]:
            made |= part.result()
    return [tuple(made[job] for job in jobs(spec)) for spec in specs]


def _work(todo: deque[Job], cache: Path, progress: Callable[[str], None]) -> dict[Job, Binary]:
    """What one child process makes of jobs that are still to do; where one fails, the others are given up."""
    made = {}
    command, environment = python("-m", WORKER), toolchain.environment(cache)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as worker:
        while todo:
            try:
                job = todo.popleft()
            except IndexError:  # another thread was faster
                break
            progress(f"compiling {job.program} of {job.spec.symbol} for {job.spec.isa}")
            try:
                made[job] = _answer(worker, job)
            except KernelError:
                todo.clear()
                raise
    return made


def _answer(worker: subprocess.Popen[bytes], job: Job) -> Binary:
    """What ``worker`` makes of ``job``; raises the error it answers with."""
    assert worker.stdin is not None and worker.stdout is not None
    deadline = time.monotonic() + PATIENCE
    limit = threading.Timer(PATIENCE, worker.kill)
    limit.start()
    try:
        pickle.dump(job, worker.stdin)
        worker.stdin.flush()
        answer: Any = pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError) as error:
        end = (
            f"with status {worker.wait()}"
            if time.monotonic() < deadline
            else f"after {PATIENCE:.0f} s without an answer"
        )
        raise KernelError(
            f"the compiler ended {end} on {job.program} of {job.spec.symbol} for {job.spec.isa}; its own messages are "
            f"above: try another release of Triton"
        ) from error
    finally:
        limit.cancel()
    if isinstance(answer, KernelError):
        raise answer
    assert isinstance(answer, Binary)
    return answer
