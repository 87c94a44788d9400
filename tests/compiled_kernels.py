"""Kernels of this machine, compiled once a process for all tests that run one."""

from __future__ import annotations

import tempfile
from functools import cache

from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.cpu.lowering import compile_object
from llmir.kernels.cpu.object_cache import ObjectCache, object_key
from llmir.targets.machine import Target
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: The instruction sets whose kernels this machine can run.
RUNNABLE_ISAS = [isa for isa in INSTRUCTION_SETS if Target.named(f"cpu:{isa}").runs_on(Target.detect())]

_OBJECTS = tempfile.TemporaryDirectory(prefix="llmir-tests-")


@cache
def loaded(spec) -> Kernel:
    """The kernel of a ``KernelSpec``, compiled in this process, which is quicker than in one of its own."""
    objects = ObjectCache(_OBJECTS.name)
    objects.get_or_build(object_key(spec), lambda: compile_object(spec))
    return Kernel.load(spec, objects)
