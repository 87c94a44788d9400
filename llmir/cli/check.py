"""``llmir check``: whether this machine can serve with llmir, and what to do about what is missing."""

from __future__ import annotations

import ctypes
import importlib
import os
import tempfile
from collections.abc import Callable
from importlib import util
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from llmir.cache import FOLDERS, KeptFolder, UntrustedError
from llmir.cli import frameworks
from llmir.cli.frameworks import Finding
from llmir.errors import KernelError, LlmirError
from llmir.ir.dtypes import QUERY_DTYPES

#: Room for the kernels and plans of several models, some tens of kilobytes each.
PROBE_BYTES = 1 << 20


def check() -> None:
    """Look for everything that serving with llmir needs, and say what to do where something is missing."""
    console = Console(highlight=False, soft_wrap=True)  # remedies are there to be copied: no line is broken
    findings = [*frameworks.findings(), *(examine() for examine in EXAMINATIONS), *kernels()]
    column = 2 + max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark, colour = (
            ("missing", "red") if finding.failed else ("advice", "yellow") if finding.remedy else ("ok", "green")
        )
        console.print(f"[{colour}]{mark:9}[/]{finding.subject:{column}}{escape(finding.found)}")
        if finding.remedy:
            console.print(f"{'':{9 + column}}{escape(finding.remedy)}")
    if any(finding.failed for finding in findings):
        raise typer.Exit(1)


def bindings() -> Finding:
    """The MLIR Python bindings, which compiling needs and serving from a warm cache does not."""
    try:
        module = importlib.import_module("llmir.ir.bindings")
    except LlmirError as error:
        return Finding("MLIR bindings", "not usable", str(error))
    return Finding("MLIR bindings", f"{module.NAME} {module.VERSION}")


def instruction_set() -> Finding:
    """The instruction set that kernels will be compiled for."""
    from llmir.targets.machine import Target

    target = Target.detect()
    found = f"{target.isa} on {target.model}, {target.cores} cores"
    if missing := target.missing():
        return Finding("instruction set", found, missing, needed=not frameworks.has_gpu())
    return Finding("instruction set", found, target.unused(), needed=False)


def gpu() -> Finding:
    """The GPU that this process may use, if any."""
    from llmir.targets.gpu import detection
    from llmir.targets.records import TargetError

    try:
        found = detection.find()
    except TargetError as error:
        return Finding("GPU", "none that there are kernels for", str(error), needed=False)
    return Finding("GPU", "none" if found is None else f"{found.model}, {found.isa}, {found.cores} multiprocessors")


def triton() -> Finding:
    """Triton, which compiles kernels for GPUs, on this machine or another; those of a CPU do without."""
    from llmir.kernels.gpu import toolchain
    from llmir.targets import registry

    try:
        release = toolchain.require()
    except KernelError as error:
        return Finding("Triton", toolchain.installed() or "not installed", str(error), needed=False)
    return Finding("Triton", f"{release}, compiles for {', '.join(registry.typical_machines(on_gpu=True))}")


def cache() -> Finding:
    """Whether compiled kernels and plans can be kept; without that they are made anew at each start."""
    from llmir.compiler import cache_folder

    subject, folder = "cache folder", cache_folder()
    try:
        for kept in (KeptFolder(folder / name) for name in FOLDERS):
            with kept.opened(make=True), tempfile.TemporaryFile(dir=kept.path) as file:
                file.write(bytes(PROBE_BYTES))
    except OSError as error:
        remedy = "set LLMIR_CACHE to a folder that can be written; until then every start compiles again"
        return Finding(subject, f"{folder}: {error.strerror}", remedy, needed=False)
    except UntrustedError as error:
        return Finding(subject, f"{folder}: not used, every start compiles again", str(error), needed=False)
    return Finding(subject, str(folder))


def openmp() -> Finding:
    """The OpenMP runtime whose threads the kernels use."""
    subject = "OpenMP runtime"
    if path := _openmp_library():
        return Finding(subject, path)
    remedy = "install torch as in requirements/*-cpu.txt, which brings libgomp"
    return Finding(subject, "none with GOMP_parallel", remedy, needed=not frameworks.has_gpu())


def _openmp_library() -> str | None:
    """The library with the runtime: a preloaded one, else the one torch brings."""
    preloaded = [path for path in _libraries(os.environ.get("LD_PRELOAD", "")) if "omp" in Path(path).name]
    for path in preloaded + _torch_libraries("libgomp*"):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return path
    return None


def kernels() -> list[Finding]:
    """Whether a kernel of each cache dtype works here: one small step of each, compiled, run and compared."""
    from llmir import kernel_test
    from llmir.ir.dtypes import DTYPES
    from llmir.targets.machine import Target

    library = _openmp_library()
    if Target.detect().missing():
        return [Finding("kernels", "not run: this machine has no instruction set for it")]
    if library is None or bindings().remedy:
        return [Finding("kernels", "not run: something above is missing")]
    findings = []
    for name in QUERY_DTYPES:
        subject = f"kernel, {DTYPES[name].torch}"
        try:
            error = kernel_test.in_own_process(name, library)
        except KernelError as failure:
            remedy = 'serve another dtype, or without llmir, and report this with the line "instruction set" above'
            findings.append(Finding(subject, str(failure), remedy))
        else:
            findings.append(Finding(subject, f"right: relative error {error:.1e} against float64"))
    return findings


def preload() -> Finding:
    """The libraries vLLM's own log recommends to preload; they help with and without llmir."""
    from llmir.compare.environment import recommended_preloads

    preloaded = os.environ.get("LD_PRELOAD", "")
    recommended = recommended_preloads(preloaded)
    if recommended == _libraries(preloaded):
        return Finding("preloaded libraries", preloaded or "none, and none recommended is installed", needed=False)
    remedy = f"faster with: export LD_PRELOAD={':'.join(recommended)}"
    return Finding("preloaded libraries", preloaded or "none", remedy, needed=False)


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    bindings,
    instruction_set,
    gpu,
    triton,
    cache,
    openmp,
    preload,
)


def _libraries(preload: str) -> list[str]:
    return [path for path in preload.replace(" ", ":").split(":") if path]


def _torch_libraries(pattern: str) -> list[str]:
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return []
    return [str(path) for path in sorted(Path(spec.origin).parent.joinpath("lib").glob(pattern))]
