"""The ops of the KV cache and of attention, and what passes make of them.

Queries, keys and values are ``[tokens, heads, head_size]``. A step's bookkeeping comes as four operands that
every layer shares: ``slots`` ``[tokens]`` i64 (where each token's key and value go: block * block_size +
offset), ``block_table`` ``[requests, max_blocks]`` i32, ``query_start`` ``[requests + 1]`` i32 and
``sequence_lengths`` ``[requests]`` i32 (tokens in the cache, the step's own included).
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from dataclasses import asdict
from typing import Any

from llmir.errors import UnsupportedLayerError
from llmir.ir import types
from llmir.ir.attributes import Selection, Weight, to_python
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
from llmir.ir.instruction_sets import INSTRUCTION_SETS
from llmir.ir.ops import check_weight
from llmir.ir.ranges import policy_problems, spec_problems, tile_problems
from llmir.ir.signature import (
    ELEMENT_BYTES,
    GPUS,
    QUANTIZED_TYPE,
    AttentionSignature,
    KernelSpec,
    StepPolicy,
)
from llmir.ir.types import PagedKVCache


def check_cache(cache: ir.Value) -> PagedKVCache:
    """Verify a cache's type and return it."""
    problem = types.problem(cache.type)
    require(problem is None, str(problem))
    return cache.type


def check_heads(value: ir.Value, heads: int | None, head_size: int, what: str) -> None:
    """Verify that a value is ``[tokens, heads, head_size]``."""
    require(
        same_shape(shape(value), [None, heads, head_size]),
        f"{what} must be [tokens, {'heads' if heads is None else heads}, {head_size}] to fit the cache, "
        f"but is {value.type}",
    )


def check_append(op: Any) -> None:
    """What append_kv and fused_attention have in common."""
    cache = check_cache(op.cache)
    for what in ("key", "value"):
        check_heads(getattr(op, what), cache.kv_heads, cache.head_size, what)
    require(op.cache.type == op.new_cache.type, f"cache is {op.cache.type}, but new cache {op.new_cache.type}")
    require(
        same_extent(shape(op.key)[0], shape(op.slots)[0]), f"{op.key.type} needs one slot a token, not {op.slots.type}"
    )


def check_attention(op: Any) -> None:
    """What paged_attention and fused_attention have in common."""
    cache = check_cache(op.cache)
    check_heads(op.query, None, cache.head_size, "query")
    heads = known(shape(op.query)[1], "number of query heads")
    require(heads % cache.kv_heads == 0, f"{heads} query heads do not share {cache.kv_heads} KV heads evenly")
    require(op.query.type == op.result.type, f"query is {op.query.type}, but result {op.result.type}")
    require(op.scale.value > 0, f"scale must be positive, but is {op.scale.value}")
    require(op.window.value >= 0, f"window must be 0 (none) or a number of tokens, but is {op.window.value}")
    require(op.soft_cap.value >= 0, f"soft_cap must be 0 (none) or positive, but is {op.soft_cap.value}")
    if op.sinks is not None:
        check_weight(op.sinks, [heads], "sinks")
    if op.alibi is not None:
        require(len(op.alibi) == heads, f"{len(op.alibi)} ALiBi slopes for {heads} query heads")
    if op.selection is not None:
        check_selection(op.selection, cache.block_size, cache.layout)


def check_selection(selection: Selection, block_size: int, layout: str) -> None:
    """Verify that a selection reads as records whose numbers are in range, for blocks of that size in ``layout``."""
    try:
        variants, policy = selection.variants, selection.policy
    except (TypeError, ValueError) as error:
        raise InvalidIRError(f"selection cannot be read: {error}") from error
    known_isas = (*INSTRUCTION_SETS, *GPUS)
    require(selection.isa in known_isas, f"unknown instruction set {selection.isa!r}; known: {', '.join(known_isas)}")
    require(len(variants) > 0, "a selection needs at least one variant")
    problems = policy_problems(policy)
    for variant in variants:
        problems += tile_problems(variant, selection.isa, block_size, layout, f"variant {variant.name!r}")
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
    """Attention of the step's queries over the cache; result ``[tokens, heads, head_size]``.

    ``scale`` multiplies query-key products; ``window`` counts tokens, the query's own included (0: all);
    ``soft_cap`` c makes a score ``c * tanh(score / c)`` (0: off); ``sinks`` is a weight ``[heads]``, ``alibi``
    a list of slopes, one a head; ``layer`` is the framework's name of the attention layer.
    """

    query: ext.Operand[Any]
    cache: ext.Operand[PagedKVCache]
    block_table: ext.Operand[Any]
    query_start: ext.Operand[Any]
    sequence_lengths: ext.Operand[Any]
    layer: ir.StringAttr
    scale: ir.FloatAttr
    window: ir.IntegerAttr
    soft_cap: ir.FloatAttr
    result: ext.Result[Any]
    causal: ir.IntegerAttr = false_by_default()
    sinks = optional_attribute("sinks", Weight)
    alibi = optional_attribute("alibi", ir.ArrayAttr)
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
    scale: ir.FloatAttr
    window: ir.IntegerAttr
    soft_cap: ir.FloatAttr
    result: ext.Result[Any]
    new_cache: ext.Result[PagedKVCache]
    causal: ir.IntegerAttr = false_by_default()
    sinks = optional_attribute("sinks", Weight)
    alibi = optional_attribute("alibi", ir.ArrayAttr)
    selection = optional_attribute("selection", Selection)
    kernel = optional_attribute("kernel", ir.FlatSymbolRefAttr)

    def check(self) -> None:
        check_append(self)
        check_attention(self)
        if self.kernel is not None:
            # Bytecode verifies a function before its module is whole: text.verify looks for missing kernels.
            kernel = find_kernel(self, self.kernel.value)
            require(
                kernel is None or to_python(kernel.attributes["signature"]) == asdict(signature_of(self)),
                f"kernel @{self.kernel.value} is made for another signature than layer {self.layer}",
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
            cache.kv_heads == 1 and cache.head_size == latent + rope,
            f"the cache must hold one head of {latent} + {rope} elements, but is {self.cache.type}",
        )
        check_weight(self.expand, [heads * (width - rope + value), latent], "expand")
        require(self.scale.value > 0, f"scale must be positive, but is {self.scale.value}")


class Kernel(LLMOp, name="kernel"):
    """A kernel function of the module: what ``fused_attention`` of one signature calls."""

    sym_name: ir.StringAttr
    signature: ir.DictAttr
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


def signature_of(op: Any) -> AttentionSignature:
    """The signature of a paged_attention or fused_attention op.

    Raises UnsupportedLayerError for what a signature cannot say: bidirectional attention, ALiBi, and element types
    that no target has a kernel for.
    """
    layer, cache = op.layer.value, op.cache.type
    quantized = cache.element_type == QUANTIZED_TYPE
    element_type: Any = str(op.query.type.element_type) if quantized else cache.element_type
    if not op.causal.value:
        raise UnsupportedLayerError(layer, "only causal attention has a kernel")
    if op.alibi is not None:
        raise UnsupportedLayerError(layer, "ALiBi has no kernel")
    if cache.element_type not in (*ELEMENT_BYTES, QUANTIZED_TYPE):
        raise UnsupportedLayerError(layer, f"a KV cache of {cache.element_type} has no kernel")
    return AttentionSignature(
        num_heads=known(shape(op.query)[1], "number of query heads"),
        num_kv_heads=cache.kv_heads,
        head_size=cache.head_size,
        element_type=element_type,
        block_size=cache.block_size,
        scale=op.scale.value,
        window=op.window.value,
        soft_cap=op.soft_cap.value,
        layout=cache.layout,
        quantized=quantized,
        sinks=op.sinks is not None,
    )


def read_signature(attribute: ir.DictAttr) -> AttentionSignature:
    """The signature a dictionary attribute holds; InvalidIRError where it holds none that a kernel can have."""
    try:
        signature = AttentionSignature(**to_python(attribute))
    except TypeError as error:
        raise InvalidIRError(f"signature cannot be read: {error}") from error
    require(
        signature.layout in types.LAYOUTS and signature.layout != "logical",
        f"a kernel needs a decided cache layout, but this one has {signature.layout!r}",
    )
    return signature


def kernel_spec(op: Any) -> KernelSpec:
    """The KernelSpec of a llm.kernel op; InvalidIRError where its attributes do not hold one."""
    signature, selection = read_signature(op.attributes["signature"]), op.attributes["selection"]
    check_selection(selection, signature.block_size, signature.layout)
    spec = KernelSpec(signature, selection.isa, selection.variants)
    problems = spec_problems(spec, f"kernel @{op.attributes['sym_name'].value}")
    require(not problems, "; ".join(problems))
    return spec


def step_policy(op: Any) -> StepPolicy:
    """The StepPolicy of a llm.kernel op."""
    return op.attributes["selection"].policy
