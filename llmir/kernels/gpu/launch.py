"""Programs ready to run: compiled for the GPU that is there, or emulated by Triton's interpreter on a CPU.

Everything is compiled when a :class:`Launch` is made. A call goes past Triton's just-in-time dispatch, which would look
at every argument anew and compile again for a stride it has not seen.
"""

from __future__ import annotations

from typing import Any

import triton

from llmir.errors import KernelError
from llmir.kernels.gpu.compilation import compile_program
from llmir.kernels.gpu.occupancy import resident_blocks
from llmir.kernels.gpu.programs import Program
from llmir.kernels.gpu.toolchain import require, warp_threads

Grid = tuple[int, int, int]


def emulated() -> bool:
    """Whether programs run in Triton's interpreter: TRITON_INTERPRET was 1 when Triton was imported."""
    return bool(triton.knobs.runtime.interpret)


class Launch:
    """One program on one architecture; ``launch(grid, *arguments)`` starts it on the current stream."""

    def __init__(self, program: Program, architecture: str):
        """Compiles ``program``; raises KernelError where Triton cannot."""
        self.program = program
        names = program.function.arg_names
        self._arguments = [program.constants.get(name) for name in names]
        self._places = [names.index(name) for name in program.types]
        #: Thread blocks that one multiprocessor holds at a time.
        self.resident_blocks = 1
        self._kernel: Any = None
        if not emulated():
            self._load(architecture)

    def _load(self, architecture: str) -> None:
        require()
        try:
            kernel = self._kernel = compile_program(self.program, architecture)
            kernel._init_handles()
        except Exception as error:
            raise KernelError(
                f"Triton {triton.__version__} cannot compile or load {self.program.name} for {architecture}: {error}"
            ) from error
        self.resident_blocks = resident_blocks(
            architecture,
            self.program.warps,
            warp_threads(architecture),
            kernel.n_regs,
            kernel.metadata.shared,
            getattr(kernel.metadata, "tmem_size", None) or 0,
        )
        if not self.resident_blocks:
            raise KernelError(
                f"{self.program.name} needs {kernel.metadata.shared} bytes of shared memory, more than a thread block "
                f"may use on {architecture}: compile the plan again"
            )

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        """``arguments`` are those of Program.types, in order: tensors, and numbers."""
        every = self._arguments.copy()
        for place, argument in zip(self._places, arguments, strict=True):
            every[place] = argument
        if self._kernel is not None:
            self._kernel[grid](*every)
        else:
            self.program.function[grid](*every)
