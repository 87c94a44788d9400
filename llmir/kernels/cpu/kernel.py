"""A kernel ready to be called: taken from the object cache, or compiled where the cache has none."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu.apart import compile_apart
from llmir.kernels.cpu.loader import load_object, process_symbol
from llmir.kernels.cpu.object_cache import ObjectCache, object_key
from llmir.targets.machine import Target

#: Fields of abi.Arguments that hold entry points of the process's OpenMP runtime, and their names there.
_OPENMP = {
    "gomp_parallel": "GOMP_parallel",
    "gomp_barrier": "GOMP_barrier",
    "omp_get_thread_num": "omp_get_thread_num",
    "omp_get_num_threads": "omp_get_num_threads",
}


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel."""

    spec: KernelSpec
    function: Callable[[int], None]
    """Takes the address of an abi.Arguments; releases the GIL while it runs."""
    openmp: dict[str, Any]
    """The OpenMP fields of abi.Arguments."""

    @classmethod
    def load(cls, spec: KernelSpec, cache: ObjectCache) -> Kernel:
        """The kernel for ``spec``; where ``cache`` has no object of it, another process compiles one.

        Raises KernelError where this machine cannot run it, where it cannot be compiled, or the process has no OpenMP
        runtime yet (import torch).
        """
        _check_machine(spec)
        openmp = {field: process_symbol(name) for field, name in _OPENMP.items()}
        loaded = load_object(cache.get_or_build(object_key(spec), lambda: compile_apart(spec)))
        return cls(spec, loaded.function(spec.symbol, [ctypes.c_void_p]), openmp)


def _check_machine(spec: KernelSpec) -> None:
    """Raise KernelError unless this processor has the instruction set: the process would end at the first call."""
    host = Target.detect()
    if not host.runs(spec.isa):
        raise KernelError(
            f"{spec.symbol} is made for {spec.isa}, and this processor ({host.model}) has {host.isa}: make the plan "
            f"anew here"
        )
