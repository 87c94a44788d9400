"""The child process of ahead.py: jobs come in on standard input, binaries or errors go out on standard output."""

from __future__ import annotations

import os
import pickle
import sys
from typing import IO

from llmir.errors import KernelError
from llmir.kernels.gpu import machine_code, toolchain
from llmir.kernels.gpu.ahead import Binary, Job, Parameter
from llmir.kernels.gpu.compilation import compile_program
from llmir.kernels.gpu.occupancy import resident_blocks, shared_memory

#: What Triton adds behind a function's own parameters: pointers to memory that a launch may have to bring.
SCRATCH = ("global_scratch", "profile_scratch")


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer jobs until there are no more."""
    while True:
        try:
            job = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_outcome(job), answers)
        answers.flush()


def _outcome(job: Job) -> Binary | KernelError:
    try:
        return build(job)
    except KernelError as error:
        return error
    except Exception as error:  # whatever a compiler can raise, in its own classes
        words = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no further words"]
        return KernelError(
            f"{job.program} of {job.spec.symbol} does not compile for {job.spec.isa} with Triton "
            f"{toolchain.installed()} ({type(error).__name__}: {words[-1]}): try another release of Triton, or another "
            f"target"
        )


def build(job: Job) -> Binary:
    """The binary of ``job``; KernelError where it does not fit the GPU."""
    from llmir.kernels.gpu.programs import programs

    architecture = job.spec.isa
    program = next(program for program in programs(job.spec) if program.name == job.program)
    compiled = compile_program(program, architecture)
    cuda = toolchain.backend(architecture) == "cuda"
    content = compiled.asm["cubin" if cuda else "hsaco"]
    code = machine_code.of_cubin(content) if cuda else machine_code.of_amdgcn(compiled.asm["amdgcn"])
    facts = compiled.metadata._asdict()
    shared, columns = facts["shared"], facts.get("tmem_size", 0)
    threads = toolchain.warp_threads(architecture)
    resident = resident_blocks(architecture, program.warps, threads, code.registers, shared, columns)
    if resident == 0:
        raise KernelError(
            f"{job.program} of {job.spec.symbol} does not fit {architecture}: a thread block takes {shared} bytes of "
            f"shared memory of {shared_memory(architecture)[0]} and {code.registers} registers for each of "
            f"{program.warps * threads} threads; choose smaller tiles or fewer stages"
        )
    return Binary(
        program=job.program,
        architecture=architecture,
        entry=facts["name"],
        content=content,
        parameters=_parameters(job, program.function.arg_names, program.types, code.parameters),
        warps=program.warps,
        threads=program.warps * threads,
        stages=program.stages,
        shared_bytes=shared,
        scratch_bytes=sum(facts.get(f"{name}_size", 0) for name in SCRATCH),
        tensor_columns=columns,
        code=code,
        resident_blocks=resident,
        triton=facts["triton_version"],
    )


def _parameters(
    job: Job, names: list[str], types: dict[str, str], found: tuple[tuple[int, int], ...]
) -> tuple[Parameter, ...]:
    """Names and types of the parameters that the binary has; KernelError where it has others than expected."""
    expected = [(name, types[name]) for name in names if name in types]
    scratch = [(name, "*i8") for name in SCRATCH][: max(0, len(found) - len(expected))]
    named = expected + scratch
    wrong = [name for (name, kind), (_, size) in zip(named, found, strict=False) if _bytes(kind) != size]
    if len(named) != len(found) or wrong:
        raise KernelError(
            f"{job.program} of {job.spec.symbol} has {len(found)} parameters in its binary, and not the expected "
            f"{', '.join(name for name, _ in named)}: this llmir does not know Triton {toolchain.installed()}"
        )
    return tuple(Parameter(name, kind, *place) for (name, kind), place in zip(named, found, strict=True))


def _bytes(kind: str) -> int:
    """Bytes of a parameter of one of Triton's types, such as ``*bf16``, ``i32`` or ``fp32``."""
    return 8 if kind.startswith("*") else max(1, int(kind.lstrip("abcdefghijklmnopqrstuvwxyz")) // 8)


if __name__ == "__main__":
    # Standard output carries answers alone; what libraries print there goes to standard error.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)
