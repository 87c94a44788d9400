"""Compiles programs of kernels in child processes, so that a run on a machine of many cores does not wait for one.

Triton keeps what they make in its cache, where this process then finds it.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.gpu.compilation import compile_program
from llmir.kernels.gpu.programs import programs


def compile_all(specs: Iterable[KernelSpec]) -> int:
    """Compiles the programs of ``specs``, equal ones once, and says how many there were.

    One that does not compile is left to whoever runs it, who says why.
    """
    jobs: dict[tuple[str, tuple[str, ...]], tuple[KernelSpec, str]] = {}
    for spec in dict.fromkeys(specs):
        for program in programs(spec):
            code = (program.name, *map(str, (program.types, program.constants, program.warps, program.stages)))
            jobs.setdefault((spec.isa, code), (spec, program.name))
    workers = max(1, min(len(os.sched_getaffinity(0)), len(jobs)))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, jobs.values()))
    return len(jobs)


def _compile(job: tuple[KernelSpec, str]) -> None:
    spec, name = job
    program = next(program for program in programs(spec) if program.name == name)
    try:
        compile_program(program, spec.isa)
    except Exception:  # whatever a compiler can raise: whoever runs the program meets it again
        return
