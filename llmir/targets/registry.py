"""The kinds of machine that there are kernels for, and what is asked of all of them by an instruction set's name.

A new kind is a folder beside this file and a line in KINDS.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from llmir.ir.attention_spec import AttentionSpec
from llmir.targets.cuda.kind import Cuda
from llmir.targets.hip.kind import Hip
from llmir.targets.kind import Kind
from llmir.targets.x86.kind import X86

if TYPE_CHECKING:
    from llmir.targets.kernel_model import KernelModel
    from llmir.targets.machine import Target
    from llmir.targets.records import Hardware

KINDS: list[Kind] = [X86(), Cuda(), Hip()]


def kind_of(isa: str) -> Kind:
    """The kind of machine that has the instruction set, or is of the architecture, ``isa``; KeyError: none."""
    for kind in KINDS:
        if isa in kind.isas:
            return kind
    raise KeyError(isa)


def isas(*, on_gpu: bool | None = None) -> tuple[str, ...]:
    """The instruction sets and architectures that there are kernels for, of GPUs or of CPUs alone if asked."""
    return tuple(isa for kind in KINDS if on_gpu in (None, kind.on_gpu) for isa in kind.isas)


def is_gpu(isa: str) -> bool:
    """Whether ``isa`` is a GPU architecture."""
    return isa in isas(on_gpu=True)


def lanes_of(isa: str) -> int:
    """Keys that a vector of ``isa`` holds of a packed cache: float32 lanes."""
    return kind_of(isa).lanes(isa)


def head_sizes(*, on_gpu: bool) -> list[int]:
    """The sizes of a head that some kernel of a GPU, or of a CPU, has; ascending."""
    return sorted({size for kind in KINDS if kind.on_gpu == on_gpu for size in kind.head_sizes})


def typical_machines(*, on_gpu: bool | None = None) -> dict[str, Hardware]:
    """By the names of their targets: GPUs, or CPUs, alone if asked."""
    kinds = (kind for kind in KINDS if on_gpu in (None, kind.on_gpu))
    return {f"{kind.prefix}:{isa}": machine for kind in kinds for isa, machine in kind.typical.items()}


def quantizing() -> tuple[str, ...]:
    """The instruction sets and architectures that have kernels for a cache of QUANTIZED_DTYPE."""
    return tuple(isa for kind in KINDS for isa in kind.isas if kind.quantizes(isa))


def unsupported(spec: AttentionSpec, isa: str) -> list[str]:
    """Why no kernel for ``isa`` computes ``spec``: every reason, a clause each. The only place that says so.

    Frontends, passes, plans and kernels ask here; a frontend adds the framework's own words.
    """
    return kind_of(isa).unsupported(spec, isa)


def kernel_model(target: Target) -> KernelModel[Any]:
    """What passes ask about the kernels of ``target``."""
    module, _, name = kind_of(target.isa).kernel_model.rpartition(".")
    made: KernelModel[Any] = getattr(import_module(module), name)(target)
    return made
