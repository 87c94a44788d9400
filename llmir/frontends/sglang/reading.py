"""SGLang as models are read with it: as on a machine without a GPU, whatever will serve them.

On a GPU, SGLang's models call fused kernels past their layers, which nothing can watch without weights. On a CPU they
compose the same layers plainly, and that is what the importer records; so what is read beside a GPU is what is read
where there is none.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

#: SGLang's package of kernels, whose builds for GPUs lack what SGLang imports from it on a CPU.
KERNELS = "sgl_kernel"


@contextlib.contextmanager
def as_on_a_cpu() -> Iterator[None]:
    """Within, SGLang is imported and builds models as on a CPU; it must not be imported before, nor serve after."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when SGLang is imported
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        yield
        return
    available, kernels = torch.cuda.is_available, sys.modules.get(KERNELS)
    torch.cuda.is_available = lambda: False
    sys.modules[KERNELS] = _NoKernels(KERNELS)
    try:
        yield
    finally:
        torch.cuda.is_available = available
        del sys.modules[KERNELS]
        if kernels is not None:
            sys.modules[KERNELS] = kernels


class _NoKernels(ModuleType):
    """Has every function by name, and none of them works: reading a model calls none."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(f"{KERNELS}.{name} is not there while a model is read")

        return missing
