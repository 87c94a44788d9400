"""``llmir compile``: from a model to its plan, or to one of the stages on the way to machine code."""

from __future__ import annotations

import importlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmir.cli import frameworks
from llmir.cli.output import deliver, deliver_bytes, deliver_folder, progress
from llmir.errors import LlmirError


class Framework(StrEnum):
    """The frameworks that llmir reads models from."""

    vllm = "vllm"
    sglang = "sglang"


class Switch(StrEnum):
    """Whether to do something that a target may gain by."""

    on = "on"
    off = "off"


class Stage(StrEnum):
    """What to write instead of the plan."""

    llm = "llm"
    llvm = "llvm"
    object = "object"


def compile_model(
    model: Annotated[str, typer.Argument(help="A model's folder, or its name on a model hub.", show_default=False)],
    framework: Annotated[
        Framework | None,
        typer.Option(help="The framework that will serve the model.", show_default="the one installed"),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            help="The machine to compile for: cpu is this one, gpu its GPU; cpu:avx512, cuda:sm_90 or hip:gfx942 a "
            "typical one, which need not be there."
        ),
    ] = "cpu",
    workload: Annotated[
        str | None, typer.Option(help="Name or file (JSON, JSON lines) of the requests to expect.", show_default=False)
    ] = None,
    prefix_sharing: Annotated[
        Switch, typer.Option(help="Whether a prefix that requests share may be read once for all of them.")
    ] = Switch.on,
    emit: Annotated[
        Stage | None,
        typer.Option(
            help="Instead of the plan: the llm IR, the kernels as LLVM IR, or as objects; for a GPU with plan and "
            "manifest.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where to write; standard output if not given. Several objects go beside it, by name; those for a GPU "
            "into it, a new folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Compile a model for a machine and write the plan, as JSON, or the IR."""
    from llmir.targets.machine import Target
    from llmir.targets.records import TargetError
    from llmir.targets.registry import is_gpu
    from llmir.workload import Workload

    machine, requests = Target.named(target), Workload.load(workload)
    if missing := machine.missing():
        raise TargetError(missing)
    on_gpu = is_gpu(machine.isa)
    _check_stage(emit, output, on_gpu)
    importlib.import_module("llmir.ir.bindings")  # if missing, said before the framework takes its time to import

    reader = frameworks.chosen(framework)
    with progress.status(f"importing {model} from {reader}") as status:
        module = importlib.import_module(f"llmir.frontends.{reader}.offline").import_model(model, machine)
        from llmir import compiler

        options = compiler.Options(build_kernels=emit in (None, Stage.object), progress=status.update)
        plan = compiler.compile(module, machine, requests, options, prefix_sharing=prefix_sharing is Switch.on)
        if emit is None:
            deliver(plan.dumps(), output)
        elif emit is Stage.llm:
            deliver(compiler.emit_llm(module), output)
        elif emit is Stage.llvm:
            deliver(compiler.emit_llvm(plan), output)
        elif output is not None and on_gpu:
            deliver_folder(compiler.emit_gpu_files(plan, options), output)
        elif output is not None:
            _deliver_objects(compiler.emit_objects(plan), output)


def _check_stage(emit: Stage | None, output: Path | None, on_gpu: bool) -> None:
    """Raise LlmirError for what can be known to fail before a model is imported, which takes its time."""
    from llmir.compare.files import check_new_folder, check_writable
    from llmir.kernels.gpu import toolchain

    if emit is Stage.object and output is None:
        raise LlmirError(f"an object is not text: say with -o {'FOLDER' if on_gpu else 'FILE'} where to write it")
    if emit is Stage.llvm and on_gpu:
        raise LlmirError("kernels for a GPU go through Triton and have no LLVM IR to write: emit object, or llm")
    if emit is Stage.object and on_gpu:
        toolchain.require()
    if output is not None:
        (check_new_folder if emit is Stage.object and on_gpu else check_writable)(output)


def _deliver_objects(objects: dict[str, bytes], output: Path) -> None:
    """Writes one kernel's object to ``output``, and several beside it, the kernels' names in the files' names."""
    for symbol, content in objects.items():
        deliver_bytes(content, output if len(objects) == 1 else output.with_stem(f"{output.stem}.{symbol}"))
