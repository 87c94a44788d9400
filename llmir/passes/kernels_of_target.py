"""Which kernels a target has: the one place where passes tell a CPU from a GPU."""

from __future__ import annotations

from typing import Any

from llmir.ir.kernel_spec import is_gpu
from llmir.passes.cpu_kernels import CpuKernels
from llmir.passes.gpu_kernels import GpuKernels
from llmir.passes.kernel_model import KernelModel
from llmir.target import Target


def kernel_model(target: Target) -> KernelModel[Any]:
    """The kernels of ``target``."""
    return GpuKernels(target) if is_gpu(target.isa) else CpuKernels(target)
