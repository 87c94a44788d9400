"""The Triton programs of one attention kernel: functions with everything that is decided before they run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmir.errors import KernelError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, padded
from llmir.ir.ranges import spec_problems
from llmir.kernels.gpu.append import append_kv
from llmir.kernels.gpu.attention import attend
from llmir.kernels.gpu.merge import merge
from llmir.targets.registry import is_gpu

APPEND_WARPS = 4
MERGE_WARPS = 4
#: States that a merge reads at a time. Each time costs two accesses to memory, one after the other, and one request of
#: 32k tokens on an H100 is in about 90 parts; at head size 128, 32 states are 32 registers of a thread.
MERGE_PARTS = 32
#: From so many rows a tile on, masks cost time: below, waiting for keys hides them.
UNMASKED_ROWS = 64


@dataclass(frozen=True)
class Program:
    """One function for one spec: what Triton compiles."""

    name: str
    """``append``, a variant's name, or ``merge``."""
    function: Any
    types: dict[str, str]
    """Arguments that come with a call, in order, and their types as Triton spells them."""
    constants: dict[str, Any]
    """Arguments that are compiled in."""
    aligned: tuple[str, ...]
    """Of :attr:`types`, addresses and strides (in elements) that are multiples of 16."""
    warps: int
    stages: int


def programs(spec: KernelSpec, *, emulated: bool = False) -> tuple[Program, ...]:
    """The programs of a kernel: append, one a variant, merge.

    ``emulated``: for Triton's interpreter. Raises KernelError for what there is no program for.
    """
    check(spec)
    attention = [_attend(spec.attention, variant, number, emulated) for number, variant in enumerate(spec.gpu_variants)]
    return (_append(spec.attention, emulated), *attention, _merge(spec.attention, emulated))


def check(spec: KernelSpec) -> None:
    """Raise KernelError for a specification without a program."""
    if problems := spec_problems(spec):
        raise KernelError(f"{spec.symbol} has no GPU program: {'; '.join(problems)}")
    if not is_gpu(spec.isa):
        raise KernelError(f"{spec.symbol} has no GPU program: it is for {spec.isa}")


def _append(s: AttentionSpec, emulated: bool) -> Program:
    element, cache = _pointer(s.dtype), _pointer(s.cache.dtype)
    types = {"key": element, "value": element, "cache": cache, "slots": "*i64", **_scales(s)}
    types |= {"key_stride": "i32", "value_stride": "i32"}
    constants = {
        "KV_HEADS": s.num_kv_heads,
        "HEAD": s.head_size,
        "BLOCK": s.cache.block_size,
        "QUANTIZED": s.cache.quantized,
        "PADDED_HEADS": padded(s.num_kv_heads),
        "PADDED_HEAD": padded(s.head_size),
        "EMULATED": emulated,
    }
    aligned = ("key", "value", "cache", "key_stride", "value_stride")
    return _program("append", append_kv, types, constants, aligned, APPEND_WARPS, stages=1)


def _attend(s: AttentionSpec, variant: GpuVariant, number: int, emulated: bool) -> Program:
    element = _pointer(s.dtype)
    types = {
        "query": element,
        "cache": _pointer(s.cache.dtype),
        "block_table": "*i32",
        "step": "*i32",
        "state_stats": "*fp32",
        "state_values": "*fp32",
        "sinks": element if s.sinks else None,
        **_scales(s),
        "output": element,
        "query_stride": "i32",
        "output_stride": "i32",
        "table_stride": "i32",
    }
    constants = {
        "VARIANT": number,
        "KV_HEADS": s.num_kv_heads,
        "GROUP": s.queries_per_kv,
        "HEAD": s.head_size,
        "BLOCK": s.cache.block_size,
        "SCALE": s.scale,
        "WINDOW": s.mask.window,
        "SOFT_CAP": s.soft_cap,
        "QUANTIZED": s.cache.quantized,
        "SINKS": s.sinks,
        "PADDED_HEAD": padded(s.head_size),
        "ROWS": variant.row_tile,
        "KEYS": variant.key_chunk,
        "STAGES": variant.stages,
        "UNMASKED": variant.row_tile >= UNMASKED_ROWS and not s.mask.window,
        "EMULATED": emulated,
    }
    aligned = ("query", "cache", "step", "state_stats", "state_values", "output", "query_stride", "output_stride")
    return _program(variant.name, attend, types, constants, aligned, variant.warps, stages=variant.stages)


def _merge(s: AttentionSpec, emulated: bool) -> Program:
    element = _pointer(s.dtype)
    types = {
        "step": "*i32",
        "state_stats": "*fp32",
        "state_values": "*fp32",
        "sinks": element if s.sinks else None,
        "output": element,
        "output_stride": "i32",
    }
    constants = {
        "KV_HEADS": s.num_kv_heads,
        "GROUP": s.queries_per_kv,
        "HEAD": s.head_size,
        "SINKS": s.sinks,
        "PADDED_HEAD": padded(s.head_size),
        "PARTS": MERGE_PARTS,
        "EMULATED": emulated,
    }
    aligned = ("step", "state_stats", "state_values", "output", "output_stride")
    return _program("merge", merge, types, constants, aligned, MERGE_WARPS, stages=1)


def _scales(s: AttentionSpec) -> dict[str, str | None]:
    return dict.fromkeys(("key_scale", "value_scale"), "*fp32" if s.cache.quantized else None)


def _pointer(dtype: str) -> str:
    return f"*{DTYPES[dtype].triton}"


def _program(
    name: str,
    function: Any,
    types: Mapping[str, str | None],
    constants: dict[str, Any],
    aligned: tuple[str, ...],
    warps: int,
    *,
    stages: int,
) -> Program:
    """A program; an argument whose type is None does not come with a call, but is compiled in as None."""
    there = {argument: kind for argument, kind in types.items() if kind is not None}
    absent = dict.fromkeys(argument for argument, kind in types.items() if kind is None)
    return Program(name, function, there, {**constants, **absent}, aligned, warps, stages)
