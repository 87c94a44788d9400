"""The whole pipeline on one page: a module, a target and a workload in, a plan out, kernels in the object cache.

A serving process imports this file for the cache folder alone, so MLIR is loaded only inside the functions that
compile.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

import llmir
from llmir import plan as plans
from llmir.cache import OBJECTS
from llmir.errors import LlmirError
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu.object_cache import ObjectCache, object_key
from llmir.plan import Decision, Plan, PlannedKernel
from llmir.targets.machine import Target
from llmir.targets.records import TargetError
from llmir.targets.registry import is_gpu
from llmir.workload import Workload

if TYPE_CHECKING:
    from llmir.ir.bindings import ir


def cache_folder() -> Path:
    """Where llmir keeps what it has compiled, a whole path: ``LLMIR_CACHE``, else the user's cache folder.

    A leading ``~`` is a home folder: what sets variables is often no shell. Raises LlmirError where there is none.
    """
    given = os.environ.get("LLMIR_CACHE") or platformdirs.user_cache_dir("llmir", appauthor=False)
    try:
        return Path(given).expanduser().absolute()
    except RuntimeError as error:
        raise LlmirError(f"there is no home folder for {given}: set LLMIR_CACHE to a whole path") from error


def object_cache(folder: Path | None = None) -> ObjectCache:
    """The compiled kernels kept below ``folder`` (default: :func:`cache_folder`)."""
    return ObjectCache((folder or cache_folder()) / OBJECTS)


@dataclass(frozen=True)
class Options:
    """How to compile, as opposed to what."""

    calibrate: bool = True
    """Measure this machine where its figures are missing; else published ones are used."""
    build_kernels: bool = True
    """Compile the kernels into the object cache."""
    cache: Path | None = None
    """Folder for kernels and measurements; None: :func:`cache_folder`."""
    progress: Callable[[str], None] | None = None
    """Called with a few words before each step that takes a while."""

    def say(self, step: str) -> None:
        """Report a step."""
        if self.progress is not None:
            self.progress(step)


def compile(
    module: ir.Module,
    target: Target,
    workload: Workload,
    options: Options | None = None,
    *,
    prefix_sharing: bool = True,
) -> Plan:
    """Decide everything about ``module`` for ``target`` and ``workload``, and compile its kernels.

    ``prefix_sharing``: whether prefixes may be read once for several requests, where the passes find that it pays.
    The module is rewritten in place. Kernels of a CPU are built on any machine of its architecture, whatever its
    instruction set; elsewhere, and for GPUs, the plan says that they were not. Raises TargetError for a CPU without
    kernels, UnsupportedLayerError for a layer without a
    kernel, KernelError where one cannot be compiled.
    """
    options = options or Options()
    host = Target.detect()
    if missing := target.missing():
        raise TargetError(missing)
    own = (replace(host, isa=target.isa), _own_gpu(target))
    if options.calibrate and target.measured is None and target in own:
        options.say("measuring this machine")
        target = calibrated(target, options)
    options.say("deciding block size and kernels")
    optimize(module, target, workload, prefix_sharing=prefix_sharing)
    built = options.build_kernels and target.builds_on(host)
    if not built:
        _remark_unbuilt(module, target, host)
    kernels = tuple(_build(kernel, options) if built else kernel for kernel in kernels_of(module))
    return _plan(module, kernels, target, host, workload)


def _own_gpu(target: Target) -> Target | None:
    """This machine's GPU, where ``target`` may be it."""
    return Target.named("gpu") if target.name == "gpu" else None


def calibrated(target: Target, options: Options) -> Target:
    """``target``, which is this machine or its GPU, with its figures measured or read from the cache folder."""
    folder = options.cache or cache_folder()
    if is_gpu(target.isa):
        from llmir.kernels.gpu.calibration import calibrate as calibrate_gpu

        return calibrate_gpu(target, folder)
    from llmir.kernels.cpu.calibration import calibrate

    return calibrate(target, folder)


def optimize(module: ir.Module, target: Target, workload: Workload, *, prefix_sharing: bool = True) -> None:
    """The passes alone, in place."""
    from llmir.passes import pipeline

    pipeline.run(module, target, workload, prefix_sharing=prefix_sharing)


def kernels_of(module: ir.Module) -> list[PlannedKernel]:
    """The kernels of an optimized module and the layers that call them; none is built yet."""
    from llmir.ir.attention import FusedAttention, Kernel, kernel_spec, step_policy
    from llmir.ir.module import ops_of

    layers: dict[str, list[str]] = {}
    for op in ops_of(module, FusedAttention):
        layers.setdefault(op.kernel.value, []).append(op.layer.value)
    return [
        PlannedKernel(symbol, kernel_spec(op), step_policy(op), tuple(layers.get(symbol, ())), object_key=None)
        for op in ops_of(module, Kernel)
        for symbol in [op.sym_name.value]
    ]


def _build(kernel: PlannedKernel, options: Options) -> PlannedKernel:
    """The kernel with its object in the cache."""
    options.say(f"compiling {kernel.symbol}")
    key = object_key(kernel.spec)
    _object(key, kernel.spec, options.cache)
    return PlannedKernel(kernel.symbol, kernel.spec, kernel.policy, kernel.layers, key)


def _object(key: str, spec: KernelSpec, folder: Path | None) -> bytes:
    def build() -> bytes:
        from llmir.kernels.cpu.lowering import compile_object

        return compile_object(spec)

    return object_cache(folder).get_or_build(key, build)


def _remark_unbuilt(module: ir.Module, target: Target, host: Target) -> None:
    from llmir.ir.remarks import Remark, add_remark

    if is_gpu(target.isa):
        reason = (
            "kernels of a GPU are compiled by Triton when serving starts, or ahead of time, on any machine, by "
            "`llmir compile --emit object`"
        )
    elif target.builds_on(host):
        reason = "not asked for"
    else:
        reason = f"this machine is {host.machine}, and kernels for {target.machine} are compiled on such a one"
    numbers = {"target_isa": target.isa, "kernels_built": 0}
    add_remark(module, Remark("kernel-building", "all kernels", "not built", reason, numbers))


def _plan(
    module: ir.Module, kernels: tuple[PlannedKernel, ...], target: Target, host: Target, workload: Workload
) -> Plan:
    from llmir.ir import bindings
    from llmir.ir.module import model_info
    from llmir.ir.opaque import import_level
    from llmir.ir.remarks import remarks

    info = model_info(module)
    framework, _, version = info.framework.partition(" ")
    caches = [kernel.spec.attention.cache for kernel in kernels]
    shared = {(cache.block_size, cache.layout, cache.dtype) for cache in caches}
    if len(shared) != 1:
        raise LlmirError(f"a model's KV caches must have one block size, layout and element type, not {sorted(shared)}")
    block_size, layout, element_type = shared.pop()
    return Plan(
        format=plans.FORMAT,
        framework=framework,
        framework_version=version,
        model=info.model,
        rank=info.rank,
        world_size=info.world_size,
        block_size=block_size,
        layout=layout,
        element_type=element_type,
        fused=True,
        kernels=kernels,
        decisions=tuple(Decision(**{**asdict(r), "alternatives": tuple(r.alternatives)}) for r in remarks(module)),
        target=target.to_json(),
        target_fingerprint=target.fingerprint,
        workload=workload.summary(),
        module_hash=module_hash(module),
        versions={"llmir": llmir.__version__, framework: version, bindings.NAME: bindings.VERSION},
        import_level=import_level(module),
    )


def module_hash(module: ir.Module) -> str:
    """sha256 of a module's text without its remarks, which hold figures that decide nothing.

    Run-time conditions are measured costs in part: the same machine measured anew may give another hash.
    """
    from llmir.ir import text
    from llmir.ir.remarks import ATTRIBUTE

    copy = text.parse(text.bytecode(module), module.context)
    if ATTRIBUTE in copy.operation.attributes:
        del copy.operation.attributes[ATTRIBUTE]
    return hashlib.sha256(text.print_module(copy).encode()).hexdigest()


def emit_llm(module: ir.Module) -> str:
    """The module as text, in the ``llm`` dialect."""
    from llmir.ir import text

    return text.print_module(module)


def emit_llvm(plan: Plan) -> str:
    """The plan's kernels in the LLVM dialect, one module each, separated the way MLIR's tools split files.

    Raises LlmirError where they are a GPU's.
    """
    target = Target.from_json(plan.target)
    if is_gpu(target.isa):
        raise LlmirError(
            f"kernels for {target.name} have no form in the LLVM dialect, since Triton compiles them: use `--emit "
            f"object`, which gives binaries"
        )
    from llmir.kernels.cpu.lowering import kernel_module, lower

    texts = []
    for kernel in plan.kernels:
        module = kernel_module(kernel.spec)
        lower(module)
        texts.append(str(module))
    return "\n// -----\n\n".join(texts)


def emit_objects(plan: Plan, options: Options | None = None) -> dict[str, bytes]:
    """The plan's kernels of a CPU as ELF objects by symbol, from the object cache or compiled now.

    Raises TargetError where this machine cannot compile them.
    """
    target, host = Target.from_json(plan.target), Target.detect()
    if not target.builds_on(host):
        raise TargetError(
            f"this machine ({host.machine}) cannot compile objects for {target.name} ({target.machine}): emit llvm, or "
            f"compile on such a one"
        )
    folder = (options or Options()).cache
    return {kernel.symbol: _object(object_key(kernel.spec), kernel.spec, folder) for kernel in plan.kernels}


def emit_gpu_files(plan: Plan, options: Options | None = None) -> dict[str, bytes]:
    """The plan, its kernels' binaries for its GPU and their manifest, as files by name; no GPU is needed.

    Raises KernelError where Triton is missing, or a kernel does not compile or does not fit the GPU.
    """
    from llmir.kernels.gpu.ahead import compile_ahead
    from llmir.kernels.gpu.manifest import file_name, manifest

    options = options or Options()
    made = compile_ahead([kernel.spec for kernel in plan.kernels], options.cache or cache_folder(), options.say)
    binaries = {kernel.symbol: of_kernel for kernel, of_kernel in zip(plan.kernels, made, strict=True)}
    texts = {"plan.json": plan.dumps(), "manifest.json": json.dumps(manifest(binaries), indent=1) + "\n"}
    return {
        **{name: text.encode() for name, text in texts.items()},
        **{file_name(symbol, one): one.content for symbol, several in binaries.items() for one in several},
    }
