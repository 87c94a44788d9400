"""What the numbers of a kernel and of its run-time conditions may be, wherever they come from.

A kernel trusts its specification: a tile of no tokens leaves outputs unwritten, one of 60000 leaves its thread's stack.
So a plan that is read, an IR module that is verified and a spec that is about to be compiled or scheduled all pass
through here. Each function gives every problem as a clause that names the field, its value and what is allowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import CpuVariant, GpuVariant, KernelSpec, SharingCosts, StepPolicy, padded
from llmir.targets.registry import head_sizes, is_gpu, isas, kind_of, lanes_of, unsupported

#: Work items and block tables are of int32.
MOST_INT32 = (1 << 31) - 1
#: Far above any model's, and below what products of sizes would overflow with.
_MOST_HEADS = 1024
_MOST_BLOCK = 1 << 16
_MOST_HEAD_SIZE = max(*head_sizes(on_gpu=False), *head_sizes(on_gpu=True))
#: What is compiled grows with a tile's sums and a chunk's keys, which are unrolled; the passes choose at most 24 sums
#: and 128 keys. Beyond these the compiler takes minutes, and then the kernel spills.
_MOST_SUMS = 96
_MOST_TILE_ROWS = 32
_MOST_VECTORS = 32
_MOST_CHUNK = 1024
_MOST_KEYS_AHEAD = 1 << 20
#: An item's scratch lies on its thread's stack: three quarters of 2 MiB, the least that glibc gives one by default.
_MOST_STACK_BYTES = 3 << 19
#: Rows of a GPU's tile: what Triton multiplies is a power of two, 16 or more; larger ones fit no GPU's registers.
_GPU_TILE = (16, 1024)
_MOST_WARPS = 32
_MOST_STAGES = 8
#: So many parts of every worker's share are states to merge; the passes ask for 4 and 2.
_MOST_PARTS = 1024
#: Times are nanoseconds, margins ratios; sums and products of these stay finite.
_LEAST_COST, _MOST_COST = 1e-12, 1e12


class _Range(NamedTuple):
    """Numbers from ``least`` to ``most``, both included: whole ones, or ``real`` ones."""

    least: float
    most: float
    real: bool = False
    or_zero: bool = False
    """Whether 0, "none", is allowed beside them."""

    def holds(self, value: Any) -> bool:
        kinds = (int, float) if self.real else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return self.least <= value <= self.most or (self.or_zero and value == 0)

    def __str__(self) -> str:
        kind = "a number" if self.real else "a whole number"
        return f"{kind} from {self.least} to {self.most}" + (", or 0" if self.or_zero else "")


_COST = _Range(_LEAST_COST, _MOST_COST, real=True)
_COST_OR_NONE = _Range(0, _MOST_COST, real=True)
_COUNT = _Range(0, MOST_INT32)

_ATTENTION = {
    "num_heads": _Range(1, _MOST_HEADS),
    "scale": _Range(2.0**-20, 2.0**10, real=True),
    "soft_cap": _Range(2.0**-10, 2.0**20, real=True, or_zero=True),
}
_CACHE = {
    "num_kv_heads": _Range(1, _MOST_HEADS),
    "key_size": _Range(1, _MOST_HEAD_SIZE),
    "value_size": _Range(1, _MOST_HEAD_SIZE),
    "block_size": _Range(1, _MOST_BLOCK),
}
_MASK = {"window": _COUNT}
_VARIANT = {"max_tokens": _Range(1, MOST_INT32), "key_chunk": _Range(1, _MOST_CHUNK)}
_CPU_VARIANT = {
    **_VARIANT,
    "row_tile": _Range(1, _MOST_TILE_ROWS),
    "key_vectors": _Range(1, _MOST_VECTORS),
    "value_vectors": _Range(1, _MOST_VECTORS),
    "prefetch": _Range(0, _MOST_KEYS_AHEAD),
}
_GPU_VARIANT = {
    **_VARIANT,
    "row_tile": _Range(*_GPU_TILE),
    "key_chunk": _Range(*_GPU_TILE),
    "warps": _Range(1, _MOST_WARPS),
    "stages": _Range(1, _MOST_STAGES),
}
_POLICY = {
    "decode_tokens": _COUNT,
    "split_keys": _Range(1, MOST_INT32),
    "items_per_thread": _Range(1, _MOST_PARTS),
}
_COSTS = {
    "most_rows": _COUNT,
    "least_tokens": _Range(1, MOST_INT32),
    "decode_rows": _COUNT,
    "read_key": _COST,
    "tile_key": _COST,
    "decode_row_key": _COST,
    "row": _COST_OR_NONE,
    "margin": _COST_OR_NONE,
}


def policy_problems(policy: StepPolicy, where: str = "policy") -> list[str]:
    """What is wrong with run-time conditions."""
    problems = _outside(policy, _POLICY, where)
    if policy.sharing is not None:
        problems += _outside(policy.sharing, _COSTS, f"{where}.sharing")
        problems += _curve_problems(policy.sharing, f"{where}.sharing.cached_key")
    return problems


def _curve_problems(costs: SharingCosts, where: str) -> list[str]:
    """A curve needs a point, and its tokens must ascend: it is searched by halves."""
    points = costs.cached_key
    if not points or any(not _COUNT.holds(tokens) or not _COST.holds(time) for tokens, time in points):
        return [f"{where} is {points}, and must be pairs, one at least, of tokens ({_COUNT}) and a time ({_COST})"]
    tokens = [size for size, _ in points]
    return [] if tokens == sorted(tokens) else [f"{where} is {points}, and its tokens must ascend"]


def tile_problems(variant: CpuVariant | GpuVariant, isa: str, cache: CacheFormat, where: str = "variant") -> list[str]:
    """What is wrong with the tiles of one variant, by themselves and for the blocks of ``cache``."""
    if isinstance(variant, GpuVariant) != is_gpu(isa):
        return [f"{where} is of a {'CPU' if is_gpu(isa) else 'GPU'}, and the kernel is for {isa}"]
    if isinstance(variant, GpuVariant):
        problems = _outside(variant, _GPU_VARIANT, where)
        for name in ("row_tile", "key_chunk", "warps"):
            size = getattr(variant, name)
            if not problems and padded(size) != size:
                problems.append(f"{where}.{name} is {size}, and must be a power of two")
        return problems
    problems = _outside(variant, _CPU_VARIANT, where)
    if problems:
        return problems
    for name in ("key_vectors", "value_vectors"):
        sums = variant.row_tile * getattr(variant, name)
        if sums > _MOST_SUMS:
            problems.append(f"{where}.row_tile x {name} is {sums}, and must be {_MOST_SUMS} or less")
    if cache.layout != "row" and not _whole(variant.key_chunk, cache.block_size):
        problems.append(
            f"{where}.key_chunk is {variant.key_chunk}, and must divide the block size {cache.block_size}, or be a "
            f"multiple of it"
        )
    return problems


def spec_problems(spec: KernelSpec, where: str = "spec") -> list[str]:
    """What is wrong with a kernel: its attention, its variants, and whether they go together."""
    s, at = spec.attention, f"{where}.attention"
    known = isas()
    if spec.isa not in known:
        return [f"{where}.isa is {spec.isa!r}, and must be one of {', '.join(known)}"]
    problems = _outside(s, _ATTENTION, at) + _outside(s.mask, _MASK, f"{at}.mask")
    problems += _outside(s.cache, _CACHE, f"{at}.cache")
    if problems:
        return problems
    problems += _attention_problems(s, spec.isa, at)
    if not spec.variants or len({variant.name for variant in spec.variants}) < len(spec.variants):
        problems.append(
            f"{where}.variants are {[v.name for v in spec.variants]}, and must be one at least of each name"
        )
    variants: tuple[CpuVariant | GpuVariant, ...] = (*spec.cpu_variants, *spec.gpu_variants)
    for number, variant in enumerate(variants):
        here = f"{where}.variants[{number}]"
        found = tile_problems(variant, spec.isa, s.cache, here)
        if not found and not problems:
            found = _fit_problems(spec, variant, here)
        problems += found
    return problems


def step_problems(spec: KernelSpec, policy: StepPolicy, where: str = "kernel") -> list[str]:
    """What is wrong with a kernel that steps are to be scheduled for: every new token must find an item."""
    problems = spec_problems(spec, f"{where}.spec") + policy_problems(policy, f"{where}.policy")
    names = sorted(variant.name for variant in spec.variants)
    if names != ["decode", "prefill"]:
        problems.append(f"{where}.spec.variants are {names}, and must be one decode and one prefill")
    return problems


def _attention_problems(s: AttentionSpec, isa: str, at: str) -> list[str]:
    """Whether an instruction set or a GPU has kernels for attention whose numbers are in range."""
    cache, problems = s.cache, [f"{at}: {reason}" for reason in unsupported(s, isa)]
    if s.num_heads % s.num_kv_heads:
        problems.append(f"{at}.num_heads is {s.num_heads}, and must be a multiple of num_kv_heads, {s.num_kv_heads}")
    layouts, group = kind_of(isa).layouts(s.dtype), cache.key_group(lanes_of(isa))
    if cache.layout not in layouts:
        words = " or ".join(map(repr, layouts))
        problems.append(f"{at}.cache.layout is {cache.layout!r}, and must be {words} on {isa}")
    elif cache.layout != "row" and cache.block_size % group:
        problems.append(
            f"{at}.cache.block_size is {cache.block_size}, and must hold whole groups of {group} keys "
            f"on {isa}, or the layout be 'row'"
        )
    return problems


def _fit_problems(spec: KernelSpec, variant: CpuVariant | GpuVariant, where: str) -> list[str]:
    """Whether a variant's tiles fit the kernel's attention, all of them in range."""
    s = spec.attention
    if isinstance(variant, GpuVariant):
        rows = variant.max_tokens * s.queries_per_kv
        if rows <= variant.row_tile:
            return []
        return [f"{where}.max_tokens x queries of a KV head is {rows}, and must fit row_tile, {variant.row_tile}"]
    problems = []
    lanes = lanes_of(spec.isa)
    group = s.cache.key_group(lanes)
    tile = variant.key_vectors * lanes
    if s.cache.layout != "row" and not _whole(tile, s.cache.block_size):
        problems.append(
            f"{where}.key_vectors is {variant.key_vectors}, and as many vectors of {lanes} keys must divide the block "
            f"size {s.cache.block_size}, or be a multiple of it"
        )
    if variant.key_chunk % tile or tile % group:
        problems.append(
            f"{where}.key_vectors is {variant.key_vectors}, and as many vectors of {lanes} keys must be whole groups "
            f"of {group} and divide key_chunk, {variant.key_chunk}"
        )
    stack = _stack_bytes(spec, variant)
    if stack > _MOST_STACK_BYTES:
        problems.append(
            f"{where}.max_tokens is {variant.max_tokens}, with which an item takes {stack} bytes of its thread's "
            f"stack, and must be so small that it takes {_MOST_STACK_BYTES} or less"
        )
    return problems


def _stack_bytes(spec: KernelSpec, variant: CpuVariant) -> int:
    """At most so many bytes of an item's scratch: rows of queries and outputs, a tile's scores, gathered keys."""
    s = spec.attention
    rows = -(-variant.max_tokens * s.queries_per_kv // variant.row_tile) * variant.row_tile
    of_row = 4 * (s.head_size + s.value_size + 4 * lanes_of(spec.isa) + 2)
    of_tile = variant.row_tile * 4 * (2 * variant.key_chunk + lanes_of(spec.isa))
    gathered = variant.key_chunk * s.cache.token_head_bytes if s.cache.layout == "row" else 0
    return rows * of_row + of_tile + gathered


def _whole(part: int, block: int) -> bool:
    """Whether ``part`` divides ``block``, or is a multiple of it."""
    return block % part == 0 or part % block == 0


def _outside(record: Any, ranges: dict[str, _Range], where: str) -> list[str]:
    """The fields of ``record`` that are not in their range."""
    values: Iterable[tuple[str, Any, _Range]] = ((name, getattr(record, name), kept) for name, kept in ranges.items())
    return [f"{where}.{name} is {value!r}, and must be {kept}" for name, value, kept in values if not kept.holds(value)]
