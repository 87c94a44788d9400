"""One program of a GPU kernel through Triton, for a GPU that need not be there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmir.kernels.gpu.toolchain import gpu_target

if TYPE_CHECKING:
    from triton.compiler import ASTSource, CompiledKernel

    from llmir.kernels.gpu.programs import Program

#: Bytes, or elements, that an aligned argument is a whole number of.
ALIGNMENT = 16


def compile_program(program: Program, architecture: str) -> CompiledKernel:
    """``program`` compiled for ``architecture``, from Triton's cache where that has it.

    Raises whatever Triton raises. The process must not have TRITON_INTERPRET set.
    """
    import triton

    return triton.compile(source(program), target=gpu_target(architecture), options=options(program))


def source(program: Program) -> ASTSource:
    """``program`` as Triton compiles it without looking at arguments of a call."""
    from triton.compiler import ASTSource

    names = program.function.arg_names
    return ASTSource(
        program.function,
        {name: program.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in program.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", ALIGNMENT]] for name in program.aligned},
    )


def options(program: Program) -> dict[str, Any]:
    """Triton's options of ``program``."""
    # Fused multiply-adds are said outright because their default is announced to change with Triton 3.10.
    return {"num_warps": program.warps, "num_stages": program.stages, "enable_fp_fusion": True}
