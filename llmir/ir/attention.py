"""The ops of the KV cache and of attention, and what passes make of them.

Queries, keys and values are ``[tokens, heads, head_size]``. A step's bookkeeping comes as four operands that
every layer shares: ``slots`` ``[tokens]`` i64 (where each token's key and value go: block * block_size +
offset), ``block_table`` ``[requests, max_blocks]`` i32, ``query_start`` ``[requests + 1]`` i32 and
``sequence_lengths`` ``[requests]`` i32 (tokens in the cache, the step's own included).
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from typing import Any

from llmir.ir import types
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.attributes import AttentionSpecAttr, Selection
from llmir.ir.base import (
    InvalidIRError,
    LLMOp,
    false_by_default,
    known,
    optional_attribute,
    require,
    same_extent,
    same_shape,
    shape,
)
from llmir.ir.bindings import ext, ir
from llmir.ir.cache_format import CacheFormat
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.ir.ops import check_weight
from llmir.ir.ranges import policy_problems, spec_problems, tile_problems
from llmir.ir.types import PagedKVCache
from llmir.ir.weight import Weight
from llmir.targets.registry import isas


def check_cache(cache: ir.Value) -> CacheFormat:
    """Verify a cache's type and return its format."""
    problem = types.problem(cache.type)
    require(problem is None, str(problem))
    format: CacheFormat = cache.type.format
    return format


def check_heads(value: ir.Value, heads: int, size: int, what: str) -> None:
    """Verify that a value is ``[tokens, heads, size]``."""
    require(
        same_shape(shape(value), [None, heads, size]), f"{what} must be [tokens, {heads}, {size}], not {value.type}"
    )


def check_append(op: Any) -> None:
    """What append_kv and fused_attention have in common."""
    cache = check_cache(op.cache)
    check_heads(op.key, cache.num_kv_heads, cache.key_size, "key")
    check_heads(op.value, cache.num_kv_heads, cache.value_size, "value")
    require(op.cache.type == op.new_cache.type, f"cache is {op.cache.type}, but new cache {op.new_cache.type}")
    require(
        same_extent(shape(op.key)[0], shape(op.slots)[0]), f"{op.key.type} needs one slot a token, not {op.slots.type}"
    )


def read_spec(op: Any) -> AttentionSpec:
    """The AttentionSpec of an op; InvalidIRError where its attribute holds none that holds together."""
    try:
        spec: AttentionSpec = op.attributes["spec"].record
    except TypeError as error:
        raise InvalidIRError(f"spec cannot be read: {error}") from error
    problem = spec.cache.problem() or spec.problem()
    require(problem is None, str(problem))
    return spec


def check_attention(op: Any) -> None:
    """What paged_attention and fused_attention have in common."""
    cache, spec = check_cache(op.cache), read_spec(op)
    require(spec.cache == cache, f"spec is of {spec.cache}, but the cache {cache}")
    check_heads(op.query, spec.num_heads, cache.key_size, "query")
    check_heads(op.result, spec.num_heads, cache.value_size, "result")
    for value in (op.query, op.result):
        element_type = types.element_name(value.type)
        require(element_type == spec.dtype, f"spec is of queries in {spec.dtype}, not {element_type}")
    require(same_extent(shape(op.query)[0], shape(op.result)[0]), f"{op.query.type} has other tokens than the result")
    require(spec.sinks == (op.sinks is not None), f"spec.sinks is {spec.sinks}, and the weight is {op.sinks}")
    if op.sinks is not None:
        check_weight(op.sinks, [spec.num_heads], "sinks")
    slopes = 0 if op.slopes is None else len(op.slopes)
    require(slopes == spec.num_heads * spec.alibi, f"{slopes} ALiBi slopes for {spec.num_heads} heads{_asked(spec)}")
    if op.selection is not None:
        check_selection(op.selection, cache)


def _asked(spec: AttentionSpec) -> str:
    return "" if spec.alibi else " of attention without ALiBi"


def check_selection(selection: Selection, cache: CacheFormat) -> None:
    """Verify that a selection reads as records whose numbers are in range, for blocks of ``cache``."""
    try:
        variants, policy = selection.variants, selection.policy
    except (TypeError, ValueError) as error:
        raise InvalidIRError(f"selection cannot be read: {error}") from error
    known_isas = isas()
    require(selection.isa in known_isas, f"unknown instruction set {selection.isa!r}; known: {', '.join(known_isas)}")
    require(len(variants) > 0, "a selection needs at least one variant")
    problems = policy_problems(policy)
    for variant in variants:
        problems += tile_problems(variant, selection.isa, cache, f"variant {variant.name!r}")
    require(not problems, "; ".join(problems))


class AppendKV(LLMOp, name="append_kv"):
    """Write the step's keys and values into the cache.

    The cache is memory the framework owns; ``new_cache`` is the same memory afterwards, so that whoever reads
    it is ordered behind the write.
    """

    cache: ext.Operand[PagedKVCache]
    key: ext.Operand[Any]
    value: ext.Operand[Any]
    slots: ext.Operand[Any]
    layer: ir.StringAttr
    new_cache: ext.Result[PagedKVCache]

    def check(self) -> None:
        check_append(self)


class PagedAttention(LLMOp, name="paged_attention", traits=[ext.Pure]):
    """Attention of the step's queries over the cache; result ``[tokens, heads, value_size]``.

    ``spec`` says what is computed; ``sinks`` is a weight ``[heads]``; ``slopes`` are ALiBi's, one a head; ``layer`` is
    the framework's name of the attention layer.
    """

    query: ext.Operand[Any]
    cache: ext.Operand[PagedKVCache]
    block_table: ext.Operand[Any]
    query_start: ext.Operand[Any]
    sequence_lengths: ext.Operand[Any]
    layer: ir.StringAttr
    spec: AttentionSpecAttr
    result: ext.Result[Any]
    sinks = optional_attribute("sinks", Weight)
    slopes = optional_attribute("slopes", ir.ArrayAttr)
    selection = optional_attribute("selection", Selection)

    def check(self) -> None:
        check_attention(self)


class FusedAttention(LLMOp, name="fused_attention"):
    """append_kv and paged_attention in one call; ``kernel`` names the llm.kernel once it is outlined."""

    query: ext.Operand[Any]
    key: ext.Operand[Any]
    value: ext.Operand[Any]
    cache: ext.Operand[PagedKVCache]
    slots: ext.Operand[Any]
    block_table: ext.Operand[Any]
    query_start: ext.Operand[Any]
    sequence_lengths: ext.Operand[Any]
    layer: ir.StringAttr
    spec: AttentionSpecAttr
    result: ext.Result[Any]
    new_cache: ext.Result[PagedKVCache]
    sinks = optional_attribute("sinks", Weight)
    slopes = optional_attribute("slopes", ir.ArrayAttr)
    selection = optional_attribute("selection", Selection)
    kernel = optional_attribute("kernel", ir.FlatSymbolRefAttr)

    def check(self) -> None:
        check_append(self)
        check_attention(self)
        if self.kernel is not None:
            # Bytecode verifies a function before its module is whole: text.verify looks for missing kernels.
            kernel = find_kernel(self, self.kernel.value)
            require(
                kernel is None or kernel.attributes["spec"] == self.spec,
                f"kernel @{self.kernel.value} is made for another spec than layer {self.layer}",
            )


class LatentAttention(LLMOp, name="latent_attention"):
    """Multi-head latent attention (DeepSeek's MLA): a cache of compressed keys and values, read in place.

    query ``[tokens, heads, nope + rope]``, latent ``[tokens, latent_size]``, rope_key ``[tokens, rope_size]``;
    the cache has one KV head of ``latent_size + rope_size`` elements; ``expand`` is the weight
    ``[heads * (nope + value_size), latent_size]``; result ``[tokens, heads, value_size]``.
    """

    query: ext.Operand[Any]
    latent: ext.Operand[Any]
    rope_key: ext.Operand[Any]
    cache: ext.Operand[PagedKVCache]
    slots: ext.Operand[Any]
    block_table: ext.Operand[Any]
    query_start: ext.Operand[Any]
    sequence_lengths: ext.Operand[Any]
    layer: ir.StringAttr
    expand: Weight
    scale: ir.FloatAttr
    result: ext.Result[Any]
    new_cache: ext.Result[PagedKVCache]
    causal: ir.IntegerAttr = false_by_default()

    def check(self) -> None:
        cache = check_cache(self.cache)
        require(self.cache.type == self.new_cache.type, "cache and new cache must have one type")
        heads, width = (known(size, "query's heads and size") for size in shape(self.query, least_rank=2)[-2:])
        latent = known(shape(self.latent)[-1], "latent size")
        rope = known(shape(self.rope_key)[-1], "size of the rotary key")
        value = known(shape(self.result)[-1], "size of a value")
        require(
            cache.num_kv_heads == 1 and cache.key_size == latent + rope,
            f"the cache must hold one head of {latent} + {rope} elements, but is {self.cache.type}",
        )
        check_weight(self.expand, [heads * (width - rope + value), latent], "expand")
        require(self.scale.value > 0, f"scale must be positive, but is {self.scale.value}")


class Kernel(LLMOp, name="kernel"):
    """A kernel function of the module: what ``fused_attention`` of one spec calls."""

    sym_name: ir.StringAttr
    spec: AttentionSpecAttr
    selection: Selection

    def check(self) -> None:
        kernel_spec(self)


def find_kernel(op: Any, name: str) -> Any:
    """The llm.kernel called ``name`` in the module around ``op``; None if there is none."""
    module = op.operation
    while module.parent is not None:
        module = module.parent.operation
    for candidate in module.regions[0].blocks[0].operations:
        if candidate.operation.name == "llm.kernel" and candidate.attributes["sym_name"].value == name:
            return candidate
    return None


def spec_of(op: Any) -> AttentionSpec:
    """The spec of a paged_attention, fused_attention or kernel op."""
    spec: AttentionSpec = op.attributes["spec"].record
    return spec


def kernel_spec(op: Any) -> KernelSpec:
    """The KernelSpec of a llm.kernel op; InvalidIRError where its attributes do not hold one."""
    attention, selection = read_spec(op), op.attributes["selection"]
    require(attention.cache.layout != "logical", "a kernel needs a decided cache layout, but this one has 'logical'")
    check_selection(selection, attention.cache)
    spec = KernelSpec(attention, selection.isa, selection.variants)
    problems = spec_problems(spec, f"kernel @{op.attributes['sym_name'].value}")
    require(not problems, "; ".join(problems))
    return spec


def step_policy(op: Any) -> StepPolicy:
    """The StepPolicy of a llm.kernel op."""
    return op.attributes["selection"].policy
