"""The passes in their order."""

from __future__ import annotations

from typing import Any

from llmir.ir import text
from llmir.ir.bindings import ir, passmanager
from llmir.passes.attention_fusion import AttentionFusion
from llmir.passes.block_sizing import BlockSizing
from llmir.passes.kernel_outlining import KernelOutlining
from llmir.passes.kernel_selection import KernelSelection
from llmir.passes.prefix_sharing import PrefixSharing
from llmir.targets.machine import Target
from llmir.workload import Workload


def passes(target: Target, workload: Workload, *, prefix_sharing: bool = True) -> list[Any]:
    """Every pass, in the order they run: tile sizes need the block size, sharing needs tiles, kernels need them all.

    ``prefix_sharing``: whether the user wants it.
    """
    return [
        BlockSizing(target, workload),
        AttentionFusion(target),
        KernelSelection(target),
        PrefixSharing(target, allowed=prefix_sharing),
        KernelOutlining(),
    ]


def run(module: ir.Module, target: Target, workload: Workload, *, prefix_sharing: bool = True) -> None:
    """Run all :func:`passes` on a module, in place; it is verified after each.

    Raises UnsupportedLayerError for a layer without a kernel, InvalidModuleError where the module is invalid.
    """
    with module.context:
        manager = passmanager.PassManager("builtin.module")
        for each in passes(target, workload, prefix_sharing=prefix_sharing):
            manager.add(each, name=each.name, argument=each.name)
        try:
            manager.run(module.operation)
        except ir.MLIRError as error:
            raise text.InvalidModuleError(f"a pass left the module invalid: {text.describe(error)}") from error
