"""Attention layers of one spec share one kernel of the module."""

from __future__ import annotations

from typing import Any

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.ir import build
from llmir.ir.attention import FusedAttention, Kernel, PagedAttention, spec_of
from llmir.ir.attributes import to_attribute
from llmir.ir.bindings import ir
from llmir.ir.kernel_spec import KernelSpec
from llmir.ir.module import body, ops_of
from llmir.ir.remarks import Remark, add_remark


def free_symbol(wanted: str, taken: set[str]) -> str:
    """``wanted``, or with the first number behind it that is free: two kernels may differ in their scale alone."""
    candidates = (wanted if number == 0 else f"{wanted}_{number}" for number in range(len(taken) + 1))
    return next(symbol for symbol in candidates if symbol not in taken)


class KernelOutlining:
    """Makes one ``llm.kernel`` for each spec and selection, which its layers then name."""

    name = "kernel-outlining"

    def __call__(self, module: ir.Operation, _pass: Any = None) -> None:
        for op in ops_of(module, PagedAttention):
            reason = "it attends to a KV cache that it does not write itself, and there is no kernel for that"
            raise UnsupportedLayerError(op.layer.value, reason)
        symbols: dict[Any, str] = {}
        layers: dict[str, list[str]] = {}
        for op in ops_of(module, FusedAttention):
            if op.selection is None:
                raise LlmirError(f"layer {op.layer.value!r} has no kernel selected: run kernel-selection first")
            spec = KernelSpec(spec_of(op), op.selection.isa, op.selection.variants)
            key = (spec, op.selection.policy)
            if key not in symbols:
                symbols[key] = free_symbol(spec.symbol, {*symbols.values(), *_symbols(module)})
                _define(module, symbols[key], *key)
            op.attributes["kernel"] = ir.FlatSymbolRefAttr.get(symbols[key])
            del op.attributes["selection"]
            layers.setdefault(symbols[key], []).append(op.layer.value)
        add_remark(module, self._remark(layers))

    def _remark(self, layers: dict[str, list[str]]) -> Remark:
        count = sum(map(len, layers.values()))
        return Remark(
            pass_name=self.name,
            subject=f"{count} attention layers",
            decision=f"{len(layers)} kernel{'s' if len(layers) != 1 else ''}: {', '.join(layers)}",
            reason=f"layers of equal heads, sizes, scale and window share code: {count - len(layers)} fewer to compile",
            numbers={"layers": count, "kernels": len(layers)},
            alternatives=[{"kernels": count, "not_chosen": "one for each layer is the same code again"}],
        )


def _symbols(module: ir.Operation) -> set[str]:
    return {kernel.sym_name.value for kernel in ops_of(module, Kernel)}


def _define(module: ir.Operation, symbol: str, spec: KernelSpec, policy: Any) -> None:
    """The ``llm.kernel`` before the decoder."""
    decoder = next(op for op in body(module).operations if op.operation.name == "func.func")
    with ir.InsertionPoint(decoder), ir.Location.name(symbol):
        kernel = build.kernel(spec, policy)
        kernel.attributes["sym_name"] = to_attribute(symbol)
