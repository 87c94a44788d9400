"""GPU architectures of all makers, by name."""

from __future__ import annotations

from llmir.targets import registry
from llmir.targets.gpu.chip import Chip
from llmir.targets.gpu.kind import Gpu
from llmir.targets.records import TargetError


def maker_of(isa: str) -> Gpu:
    """The kind of GPU that is of the architecture ``isa``; KeyError: none."""
    kind = registry.kind_of(isa)
    if not isinstance(kind, Gpu):
        raise KeyError(isa)
    return kind


def chip_of(isa: str) -> Chip:
    """The chip of the architecture ``isa``; KeyError: none."""
    return maker_of(isa).chips[isa]


def known(isa: str, model: str) -> str:
    """``isa``, which a GPU called ``model`` is of; TargetError where there are no kernels for it."""
    gpus = registry.isas(on_gpu=True)
    if isa not in gpus:
        raise TargetError(
            f"{model} is {isa}, and there are kernels for {', '.join(gpus)}; serve on the CPU, target cpu"
        )
    return isa
