"""Functions that build the ops from Python values: ``x = build.linear(x, weight)``.

They insert at the current insertion point with the current location. Give layers their framework's name as
location (``with ir.Location.name("model.layers.0.mlp"):``): errors then say where. Result types follow from
the arguments. A mistake shows when the module is verified.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from llmir.ir import attention, experts, ops, types
from llmir.ir.attention_spec import AttentionSpec, Mask, ScoreStage
from llmir.ir.attributes import AttentionSpecAttr, Selection, to_attribute
from llmir.ir.base import known, shape
from llmir.ir.bindings import ir
from llmir.ir.weight import Weight

_CAUSAL = Mask()


def _like(value: ir.Value, new_shape: Sequence[int | None], element_type: str | None = None) -> ir.Type:
    """A tensor type with another shape (and another element type)."""
    return types.tensor(new_shape, element_type or types.element_name(value.type))


def _set(op: Any, **optional: Any) -> Any:
    """Set the attributes that are not None."""
    for name, value in optional.items():
        if value is not None:
            op.attributes[name] = to_attribute(value)
    return op


def embedding(ids: ir.Value, weight: Weight) -> ir.Value:
    """Rows of ``weight`` ``[vocabulary, hidden]`` for ids ``[tokens]``."""
    result = types.tensor([*shape(ids), weight.shape[-1]], weight.element_type)
    return ops.Embedding(ids=ids, weight=weight, result=result).result


def linear(x: ir.Value, weight: Weight, bias: Weight | None = None, *, element_type: str | None = None) -> ir.Value:
    """``x @ weight.T + bias`` for weight ``[outputs, inputs]`` as it lies on this rank."""
    result = _like(x, [*shape(x)[:-1], weight.shape[0]], element_type)
    return _set(ops.Linear(x=x, weight=weight, result=result), bias=bias).result


def rms_norm(
    x: ir.Value,
    weight: Weight | None,
    *,
    epsilon: float,
    residual: ir.Value | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """The normalized x; with a residual, the pair (normalized, x + residual).

    ``weight_offset`` is 1 for Gemma, whose weights are stored less one.
    """
    op = ops.RMSNorm(
        x=x,
        epsilon=to_attribute(float(epsilon)),
        weight_offset=to_attribute(float(weight_offset)),
        result=x.type,
        residual=residual,
        residual_result=None if residual is None else x.type,
    )
    _set(op, weight=weight)
    return op.result if residual is None else (op.result, op.residual_result)


def layer_norm(x: ir.Value, weight: Weight | None, bias: Weight | None = None, *, epsilon: float) -> ir.Value:
    """Normalization over the last dimension, with its mean taken off."""
    op = ops.LayerNorm(x=x, epsilon=to_attribute(float(epsilon)), result=x.type)
    return _set(op, weight=weight, bias=bias).result


def rope(
    positions: ir.Value,
    query: ir.Value,
    key: ir.Value | None = None,
    *,
    head_size: int,
    base: float,
    rotary_size: int | None = None,
    style: str = "half",
    scaling: Mapping[str, Any] | None = None,
) -> Any:
    """The turned query, or with a key the pair (query, key); ``rotary_size`` is ``head_size`` if not given."""
    op = ops.Rope(
        positions=positions,
        query=query,
        head_size=to_attribute(head_size),
        rotary_size=to_attribute(rotary_size or head_size),
        base=to_attribute(float(base)),
        style=to_attribute(style),
        query_result=query.type,
        key=key,
        key_result=None if key is None else key.type,
    )
    _set(op, scaling=scaling)
    return op.query_result if key is None else (op.query_result, op.key_result)


def append_kv(cache: ir.Value, key: ir.Value, value: ir.Value, slots: ir.Value, *, layer: str) -> ir.Value:
    """The cache after the step's keys and values ``[tokens, kv_heads, head_size]`` are written."""
    return attention.AppendKV(
        cache=cache, key=key, value=value, slots=slots, layer=to_attribute(layer), new_cache=cache.type
    ).new_cache


def paged_attention(
    query: ir.Value,
    cache: ir.Value,
    block_table: ir.Value,
    query_start: ir.Value,
    sequence_lengths: ir.Value,
    *,
    layer: str,
    scale: float,
    mask: Mask = _CAUSAL,
    score_stages: Sequence[ScoreStage] = (),
    sinks: Weight | None = None,
    slopes: Sequence[float] | None = None,
) -> ir.Value:
    """Attention of query ``[tokens, heads, key_size]`` over the cache: ``[tokens, heads, value_size]``.

    ``sinks`` ``[heads]``; ``slopes``: one a head, where Alibi is among the stages; see AttentionSpec for the rest.
    """
    tokens, heads, _ = shape(query)
    format, dtype = cache.type.format, types.element_name(query.type)
    spec = AttentionSpec(
        known(heads, "number of query heads"), dtype, float(scale), format, mask, tuple(score_stages), sinks is not None
    )
    op = attention.PagedAttention(
        query=query,
        cache=cache,
        block_table=block_table,
        query_start=query_start,
        sequence_lengths=sequence_lengths,
        layer=to_attribute(layer),
        spec=AttentionSpecAttr.build(spec),
        result=_like(query, [tokens, heads, format.value_size]),
    )
    return _set(op, sinks=sinks, slopes=slopes).result


def fused_attention(append: attention.AppendKV, attend: attention.PagedAttention) -> attention.FusedAttention:
    """``append``, and then ``attend``, as one op, which is returned: its results are ``result`` and ``new_cache``."""
    op = attention.FusedAttention(
        query=attend.query,
        key=append.key,
        value=append.value,
        cache=append.cache,
        slots=append.slots,
        block_table=attend.block_table,
        query_start=attend.query_start,
        sequence_lengths=attend.sequence_lengths,
        layer=attend.layer,
        spec=attend.spec,
        result=attend.result.type,
        new_cache=append.cache.type,
    )
    return _set(op, sinks=attend.sinks, slopes=attend.slopes)


def latent_attention(
    query: ir.Value,
    latent: ir.Value,
    rope_key: ir.Value,
    cache: ir.Value,
    slots: ir.Value,
    block_table: ir.Value,
    query_start: ir.Value,
    sequence_lengths: ir.Value,
    *,
    layer: str,
    expand: Weight,
    scale: float,
    value_size: int,
    causal: bool = True,
) -> attention.LatentAttention:
    """MLA as one op, which is returned; results ``result`` ``[tokens, heads, value_size]`` and ``new_cache``."""
    return attention.LatentAttention(
        query=query,
        latent=latent,
        rope_key=rope_key,
        cache=cache,
        slots=slots,
        block_table=block_table,
        query_start=query_start,
        sequence_lengths=sequence_lengths,
        layer=to_attribute(layer),
        expand=expand,
        scale=to_attribute(float(scale)),
        causal=to_attribute(causal),
        result=_like(query, [*shape(query)[:-1], value_size]),
        new_cache=cache.type,
    )


def kernel(spec: Any, policy: Any) -> attention.Kernel:
    """A module-level kernel op for a KernelSpec and a StepPolicy (``llmir.ir.kernel_spec``), named ``spec.symbol``."""
    return attention.Kernel(
        sym_name=to_attribute(spec.symbol),
        spec=AttentionSpecAttr.build(spec.attention),
        selection=Selection.build(isa=spec.isa, variants=spec.variants, policy=policy),
    )


def activation(x: ir.Value, kind: str) -> ir.Value:
    """A non-linearity by name (``ops.ACTIVATIONS``); the gated ones halve the last dimension."""
    result = shape(x)
    if kind in ops.GATED_ACTIVATIONS and result[-1] is not None:
        result[-1] //= 2
    return ops.Activation(x=x, kind=to_attribute(kind), result=_like(x, result)).result


def route(
    router_logits: ir.Value,
    *,
    top_k: int,
    scoring: str = "softmax",
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Weight | None = None,
    index_type: str = "i32",
) -> tuple[ir.Value, ir.Value]:
    """Shares (f32) and choices of each token's experts, see Route."""
    chosen = [*shape(router_logits)[:-1], top_k]
    op = experts.Route(
        router_logits=router_logits,
        top_k=to_attribute(top_k),
        scoring=to_attribute(scoring),
        groups=to_attribute(groups),
        top_groups=to_attribute(top_groups),
        renormalize=to_attribute(renormalize),
        scale=to_attribute(float(scale)),
        shares=types.tensor(chosen, "f32"),
        choices=types.tensor(chosen, index_type),
    )
    _set(op, bias=bias)
    return op.shares, op.choices


def moe(
    x: ir.Value,
    shares: ir.Value,
    choices: ir.Value,
    *,
    gate_up: Weight,
    down: Weight,
    num_experts: int,
    activation: str = "silu",
    gate_up_bias: Weight | None = None,
    down_bias: Weight | None = None,
) -> ir.Value:
    """The experts that :func:`route` chose; see MoE for the shapes."""
    op = experts.MoE(
        x=x,
        shares=shares,
        choices=choices,
        gate_up=gate_up,
        down=down,
        experts=to_attribute(num_experts),
        activation=to_attribute(activation),
        result=x.type,
    )
    return _set(op, gate_up_bias=gate_up_bias, down_bias=down_bias).result


def all_reduce(x: ir.Value, *, ranks: int) -> ir.Value:
    """The sum of x over a group of ranks."""
    return ops.AllReduce(x=x, ranks=to_attribute(ranks), result=x.type).result


def send(x: ir.Value, *, peer: int) -> None:
    """Hand x to pipeline rank ``peer``."""
    ops.Send(x=x, peer=to_attribute(peer))


def recv(type: ir.Type, *, peer: int) -> ir.Value:
    """A tensor of this type from pipeline rank ``peer``."""
    return ops.Recv(peer=to_attribute(peer), result=type).result


def logits(
    x: ir.Value, weight: Weight, bias: Weight | None = None, *, scale: float = 1.0, soft_cap: float = 0.0
) -> ir.Value:
    """Scores over the vocabulary, for weight ``[vocabulary, hidden]``."""
    op = ops.Logits(
        x=x,
        weight=weight,
        scale=to_attribute(float(scale)),
        soft_cap=to_attribute(float(soft_cap)),
        result=_like(x, [*shape(x)[:-1], weight.shape[0]]),
    )
    return _set(op, bias=bias).result


def elementwise(
    function: str,
    x: ir.Value,
    y: ir.Value | None = None,
    *,
    scalar: float | None = None,
    result_type: ir.Type | None = None,
) -> ir.Value:
    """``x``, ``x`` and ``y``, or ``x`` and a scalar through a function by name (``ops.UNARY``, ``ops.BINARY``).

    The result has the type of the argument of the higher rank unless ``result_type`` says otherwise.
    """
    if result_type is None:
        result_type = x.type if y is None or len(shape(x)) >= len(shape(y)) else y.type
    op = ops.Elementwise(function=to_attribute(function), x=x, y=y, result=result_type)
    return _set(op, scalar=None if scalar is None else float(scalar)).result


def slice(x: ir.Value, offset: int, size: int, *, dim: int = -1) -> ir.Value:
    """``size`` elements of x from ``offset`` along a dimension."""
    whole = shape(x)
    dim %= len(whole)
    return ops.Slice(
        x=x,
        dim=to_attribute(dim),
        offset=to_attribute(offset),
        size=to_attribute(size),
        result=_like(x, [*whole[:dim], size, *whole[dim + 1 :]]),
    ).result


def split(x: ir.Value, sizes: Sequence[int], *, dim: int = -1) -> list[ir.Value]:
    """x cut into pieces of these sizes along a dimension: one slice each."""
    offsets = accumulate(sizes, initial=0)
    return [slice(x, offset, size, dim=dim) for offset, size in zip(offsets, sizes, strict=False)]


def reshape(x: ir.Value, new_shape: Sequence[int | None]) -> ir.Value:
    """The elements of x in another shape; None is a dimension known only when it runs."""
    return ops.Reshape(x=x, result=_like(x, new_shape)).result
