"""Measures this machine's GPU: how fast it reads memory, multiplies, and launches kernels.

Unverified: this has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmir.errors import KernelError
from llmir.kernels.calibration_cache import measured
from llmir.kernels.gpu import toolchain
from llmir.targets.machine import Target
from llmir.targets.records import Measurements

#: Contiguous pieces that are read in random order, in bytes: from one key of a small head to several pages.
PIECES = tuple(128 << i for i in range(0, 12, 2))
#: Bytes that are read again and again: from a part of any L2 to more than it holds.
WORKING_SETS = tuple((4 << 20) << i for i in range(7))
#: Memory that is read once: many times an L2, if so much is free.
_MEMORY, _PART_OF_FREE_MEMORY = 1 << 30, 1 / 4
#: Read of a working set in one measurement.
_READ_AGAIN = 4 << 30
#: Bytes that a program of the measuring kernel has on their way at a time, and programs for each SM or CU.
_TILE, _PROGRAMS = 16 << 10, 8
_ELEMENT = 4
#: Rows and columns of the matrices of a product.
_PRODUCT_SIZE = {"bfloat16": 8192, "float32": 4096}
#: Links of a chain, each in a line of its own, together more than an L2 holds; and how many are followed.
_LINKS, _LINK_BYTES, _STEPS = 4 << 20, 128, 10_000
#: Empty kernels in one CUDA graph.
_LAUNCHES = 200


class Probe(Protocol):
    """What can be timed on a GPU; all results in seconds."""

    free_bytes: int

    def read(self, places: np.ndarray, part: int, programs: int) -> float:
        """``programs`` thread blocks read parts of ``part`` elements (of four bytes) that begin at ``places``."""

    def product(self, element_type: str, size: int) -> float:
        """A product of two square matrices."""

    def access(self, links: int, link_bytes: int, steps: int) -> float:
        """One of ``steps`` accesses, each of which waits for the one before."""

    def launch(self, launches: int) -> float:
        """One of so many empty kernels in a graph."""


def calibrate(target: Target, folder: Path | None = None) -> Target:
    """``target``, which must be this machine's GPU, with its measured figures.

    ``folder``: where figures are kept; they are read from there if this GPU has been measured before. Raises
    KernelError if the target is another machine, or where torch cannot use the GPU, TargetError where there is none.
    """
    own = Target.named("gpu")
    if target.fingerprint != own.fingerprint:
        raise KernelError(
            f"target {target.name} ({target.fingerprint}) cannot be measured from here ({own.fingerprint}); run the "
            f"calibration on that machine, or compile with its published figures"
        )
    return measured(target, folder, __name__, _toolchain(), lambda: figures(target, _Gpu()))


def _toolchain() -> str:
    """The releases of what the measuring programs and products run through, without importing it."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    return f"triton {toolchain.installed()}, torch {torch}"


def figures(target: Target, probe: Probe) -> Measurements:
    """All figures of ``target``, by what ``probe`` times."""
    memory = min(_MEMORY, int(probe.free_bytes * _PART_OF_FREE_MEMORY)) // PIECES[-1] * PIECES[-1]
    programs = target.cores * _PROGRAMS

    def rate(piece: int, within: int, total: int, programs: int) -> float:
        """Bytes a second of reading pieces of the first ``within`` bytes in random order, ``total`` bytes in all."""
        places, part = _places(piece, within, total)
        return len(places) * part * _ELEMENT / probe.read(places, part, programs)

    def product_rate(element_type: str) -> float:
        size = _PRODUCT_SIZE[element_type]
        return 2 * size**3 / probe.product(element_type, size) / target.cores

    pieces = [(piece, rate(piece, memory, memory, programs)) for piece in PIECES]
    return Measurements(
        read_bandwidth=rate(PIECES[-1], memory, memory // target.cores, 1),  # of one thread block: an SM could do more
        read_bandwidth_all=max(bandwidth for _, bandwidth in pieces),
        piece_bandwidth=tuple(pieces),
        cached_bandwidth=tuple((size, rate(_TILE, size, _READ_AGAIN, programs)) for size in WORKING_SETS),
        bf16_rate=product_rate("bfloat16"),
        f32_rate=product_rate("float32"),
        fork_join_seconds=probe.launch(_LAUNCHES),
        threads=target.cores,
        origin=f"measured on this {target.model}",
        latency_seconds=probe.access(_LINKS, _LINK_BYTES, _STEPS),
    )


def _places(piece: int, within: int, total: int) -> tuple[np.ndarray, int]:
    """Where parts of pieces begin, int64, and elements of a part: a piece, or a tile's worth of a larger one."""
    part = min(piece, _TILE) // _ELEMENT
    pieces = np.arange(0, within // _ELEMENT, piece // _ELEMENT)
    np.random.default_rng(0).shuffle(pieces)
    parts = (pieces[:, None] + np.arange(0, piece // _ELEMENT, part)[None, :]).reshape(-1)
    return np.resize(parts, total // _ELEMENT // part), part


class _Gpu:
    """The first GPU, through torch and Triton."""

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise KernelError(
                f"torch {torch.__version__} cannot use this machine's GPU: install torch for CUDA or ROCm, or compile "
                f"with published figures, such as --target cuda:sm_90"
            )
        self.torch = torch
        self.free_bytes = torch.cuda.mem_get_info()[0]
        self.memory: Any = torch.empty(0, dtype=torch.int32)

    def read(self, places: np.ndarray, part: int, programs: int) -> float:
        from llmir.kernels.gpu.measuring import read_tiles

        needed = int(places.max()) + part
        if self.memory.numel() < needed:
            self.memory = self.torch.zeros(needed, dtype=self.torch.int32, device="cuda")
        on_gpu = self.torch.from_numpy(places).cuda()
        sums = self.torch.empty(programs, dtype=self.torch.int32, device="cuda")
        parts = _TILE // _ELEMENT // part
        return _seconds(
            lambda: read_tiles[(programs,)](self.memory, on_gpu, sums, len(places) // parts, PARTS=parts, PART=part)
        )

    def product(self, element_type: str, size: int) -> float:
        torch = self.torch
        kind = getattr(torch, element_type)
        # Not zeros, by which a GPU stays cooler and clocks higher.
        a, b = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
        out = torch.empty(size, size, dtype=kind, device="cuda")
        return _seconds(lambda: torch.matmul(a, b, out=out))

    def access(self, links: int, link_bytes: int, steps: int) -> float:
        from llmir.kernels.gpu.measuring import chase

        torch, stride = self.torch, link_bytes // 8
        order = torch.randperm(links, device="cuda") * stride
        chain = torch.zeros(links * stride, dtype=torch.int64, device="cuda")
        chain[order] = order.roll(-1)
        end = torch.empty(1, dtype=torch.int64, device="cuda")
        return _seconds(lambda: chase[(1,)](chain, end, steps, num_warps=1)) / steps

    def launch(self, launches: int) -> float:
        from llmir.kernels.gpu.measuring import nothing

        memory = self.torch.empty(1, device="cuda")
        nothing[(1,)](memory)  # compiled before the graph is captured
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            for _ in range(launches):
                nothing[(1,)](memory)
        return _seconds(graph.replay) / launches


def _seconds(run: Callable[[], Any]) -> float:
    """Median time of ``run``, its data not in L2 at the beginning."""
    from triton.testing import do_bench

    return do_bench(run, return_mode="median") / 1e3
