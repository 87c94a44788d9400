"""Triton, as far as compiling needs it: which release is installed, what it compiles for, and in which environment."""

from __future__ import annotations

import os
import re
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmir.cache import TRITON, KeptFolder
from llmir.errors import KernelError
from llmir.targets.gpu.architectures import maker_of
from llmir.targets.registry import isas

if TYPE_CHECKING:
    from triton.backends.compiler import GPUTarget

#: What carries the module triton: the builds of PyTorch for ROCm bring their own.
DISTRIBUTIONS = ("triton", "triton-rocm", "pytorch-triton-rocm", "pytorch-triton")
#: The releases that the kernels were compiled with, from the first to before the second; pyproject.toml's extra "gpu".
RELEASES = ((3, 6), (3, 10))


def installed() -> str | None:
    """The release of Triton that is installed, without importing it; None where there is none."""
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def require() -> str:
    """The installed release of Triton; KernelError where there is none, or one that the kernels never met."""
    release = installed()
    oldest, beyond = (".".join(map(str, bound)) for bound in RELEASES)
    remedy = f"install one from {oldest} to before {beyond}, such as requirements/vllm-cpu.txt names"
    if release is None:
        raise KernelError(f"GPU kernels are compiled by Triton, which is not installed: {remedy}")
    if not RELEASES[0] <= _numbers(release) < RELEASES[1]:
        raise KernelError(f"GPU kernels were never compiled with Triton {release}: {remedy}")
    return release


def backend(architecture: str) -> str:
    """Triton's name of the backend that compiles for ``architecture``."""
    known = isas(on_gpu=True)
    if architecture not in known:
        raise KernelError(f"no kernels for a GPU architecture {architecture!r}; there are {', '.join(known)}")
    return maker_of(architecture).machine


def warp_threads(architecture: str) -> int:
    """Threads of a warp on ``architecture``."""
    return maker_of(architecture).warp_threads


def gpu_target(architecture: str) -> GPUTarget:
    """Triton's record of ``architecture``; imports Triton."""
    from triton.backends.compiler import GPUTarget

    name = backend(architecture)
    arch = int(architecture.removeprefix("sm_")) if name == "cuda" else architecture
    return GPUTarget(name, arch, warp_threads(architecture))


def environment(cache: Path) -> dict[str, str]:
    """This process's environment for a process that compiles, with what Triton keeps in a folder below ``cache``.

    Triton loads libraries from there, so UntrustedError is raised where others can write there, and KernelError where
    nobody can.
    """
    folder = KeptFolder(cache / TRITON)
    try:
        path = folder.made()
    except OSError as error:
        raise KernelError(
            f"Triton cannot keep files in {folder.path} ({error.strerror}): set LLMIR_CACHE to a folder that can be "
            f"written"
        ) from error
    # The interpreter replaces the kernels' functions when they are imported, and those cannot be compiled.
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # Without line information a binary says nothing about the folders of the machine that compiled it.
    return {**kept, "TRITON_CACHE_DIR": str(path), "TRITON_DISABLE_LINE_INFO": "1"}


def _numbers(release: str) -> tuple[int, ...]:
    """Major and minor number of a release."""
    return tuple(int(number) for number in re.findall(r"\d+", release)[:2])
