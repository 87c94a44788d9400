"""The layers that all frameworks have as llm ops: one function an op, from tensors and plain numbers.

A framework's frontend has a handler for each of its layer classes, which reads that class's attributes and calls one
of these. Each takes the recorder and meta tensors, writes the op, and gives the meta tensors that the layer would.
Shapes: hidden states ``[tokens, hidden]``; a leading dimension of heads of its own is kept as it comes. ``shards`` and
``rank`` are the layer's tensor-parallel ranks and which one of them this is; weights are as they lie on this rank.

``HANDLERS`` has the classes of torch.nn itself; a frontend's own table begins as a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from llmir.frontends.common.quantized import Quantized, quantized
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.common.support import class_name
from llmir.ir import build
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.module import Decoder
from llmir.ir.opaque import opaque
from llmir.ir.types import PagedKVCache, tensor
from llmir.ir.weight import Weight

Tensor = torch.Tensor


def embedding(recorder: Recorder, ids: Tensor, weight: Tensor, *, shards: int = 1, rank: int = 0) -> Tensor:
    """Rows of ``weight`` [vocabulary, hidden] for ``ids`` [tokens]."""
    value = build.embedding(recorder.value(ids), recorder.weight(weight, shards=shards, index=rank))
    if shards > 1:  # each rank looks up its own part of the vocabulary and has zeros for the rest
        value = build.all_reduce(value, ranks=shards)
    return recorder.set(torch.empty(*ids.shape, weight.shape[-1], dtype=weight.dtype, device="meta"), value)


def linear(
    recorder: Recorder,
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    shards: int = 1,
    rank: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ weight.T + bias``, each rank computing some of the outputs; ``weight`` [outputs, inputs].

    ``dtype``: of the result, x's if not given.
    """
    result = torch.empty(*x.shape[:-1], weight.shape[0], dtype=dtype or x.dtype, device="meta")
    value = build.linear(
        recorder.value(x),
        recorder.weight(weight, shards=shards, index=rank),
        None if bias is None else recorder.weight(bias, shards=shards, index=rank),
        element_type=recorder.element(result),
    )
    return recorder.set(result, value)


def row_linear(
    recorder: Recorder,
    x: Tensor,
    weight: Tensor | Quantized,
    bias: Tensor | None = None,
    *,
    shards: int = 1,
    rank: int = 0,
    input_is_parallel: bool = True,
    reduce: bool = True,
) -> Tensor:
    """``x @ weight.T + bias``, each rank multiplying some of the inputs; ``weight`` [outputs, inputs].

    ``input_is_parallel``: x holds this rank's inputs alone. ``reduce``: the ranks' results are summed.
    """
    value = recorder.value(x)
    if shards > 1 and not input_is_parallel:
        part = x.shape[-1] // shards
        value = build.slice(value, rank * part, part)
    # Where ranks sum their results, the first one alone adds the bias.
    added = None if bias is None or rank > 0 else recorder.weight(bias)
    value = build.linear(value, recorder.weight(weight, dim=1, shards=shards, index=rank), added)
    if reduce and shards > 1:
        value = build.all_reduce(value, ranks=shards)
    return recorder.new(value, x, weight.shape[0])


def linear_weight(layer: Any, *, plain: bool, outputs: int, inputs: int) -> Tensor | Quantized:
    """The weight [outputs, inputs] of a linear layer on this rank; NotInDialectError where its storage is not known.

    ``plain``: whether it is not quantized.
    """
    return layer.weight if plain else quantized(layer, (outputs, inputs), quant_method(layer))


def quant_method(layer: Any) -> str:
    """What a framework calls the way in which a layer of it is quantized."""
    config = getattr(layer, "quant_config", None)
    return class_name(layer.quant_method) if config is None else str(config.get_name())


def opaque_linear(recorder: Recorder, layer: nn.Module, x: Tensor, outputs: int, *, ranks: int = 1) -> Tensor:
    """A linear layer whose weights are stored in no known way, as an opaque op; ``outputs`` are this rank's.

    ``ranks``: of a group that sums its results.
    """
    result = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype, device="meta")
    weights = [recorder.weight(parameter) for parameter in layer.parameters()]
    types = [recorder.type_of(result)]
    [value] = opaque(class_name(layer), [recorder.value(x)], types, path=recorder.path, weights=weights)
    return recorder.set(result, build.all_reduce(value, ranks=ranks) if ranks > 1 else value)


def recorded_sum(ranks: int) -> Callable[[Tensor], Tensor]:
    """What stands for a group's sum over ``ranks`` between layers: it becomes an op like the layers around it."""

    def all_reduce(x: Tensor) -> Tensor:
        recorder = _get_current_dispatch_mode()
        if ranks == 1 or not isinstance(recorder, Recorder):
            return x
        with _disable_current_modes():
            return recorder.new(build.all_reduce(recorder.value(x), ranks=ranks), x)

    return all_reduce


def rms_norm(
    recorder: Recorder,
    x: Tensor,
    weight: Tensor | None,
    *,
    epsilon: float,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Any:
    """The normalized x; with a residual, the pair (normalized, x + residual).

    ``weight_offset`` is 1 for Gemma, whose weights are stored less one.
    """
    value = build.rms_norm(
        recorder.value(x),
        None if weight is None else recorder.weight(weight),
        epsilon=epsilon,
        residual=None if residual is None else recorder.value(residual),
        weight_offset=weight_offset,
    )
    if residual is None:
        return recorder.new(value, x)
    return recorder.new(value[0], x), recorder.new(value[1], x)


def layer_norm(recorder: Recorder, x: Tensor, weight: Tensor | None, bias: Tensor | None, *, epsilon: float) -> Tensor:
    """The normalized x, its mean taken off."""
    scale, offset = (None if p is None else recorder.weight(p) for p in (weight, bias))
    return recorder.new(build.layer_norm(recorder.value(x), scale, offset, epsilon=epsilon), x)


def rope(
    recorder: Recorder,
    positions: Tensor,
    query: Tensor,
    key: Tensor | None,
    *,
    head_size: int,
    rotary_size: int,
    base: float,
    neox: bool = True,
    scaling: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Query and key turned by their ``positions`` [tokens].

    ``neox``: a pair of elements is half a head apart, not side by side.
    ``scaling``: a long-context variant, its ``kind`` and numbers.
    """
    value = build.rope(
        recorder.value(positions),
        recorder.value(query),
        None if key is None else recorder.value(key),
        head_size=head_size,
        rotary_size=rotary_size,
        base=base,
        style="half" if neox else "interleaved",
        scaling=scaling,
    )
    if key is None:
        return recorder.new(value, query), None
    return recorder.new(value[0], query), recorder.new(value[1], key)


def rotary_embedding(
    recorder: Recorder, layer: Any, plain: type, positions: Tensor, query: Tensor, key: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`rope` of a layer as both frameworks write it; one of class ``plain`` has no long-context variant."""
    return rope(
        recorder,
        positions,
        query,
        key,
        head_size=layer.head_size,
        rotary_size=layer.rotary_dim,
        base=layer.base,
        neox=getattr(layer, "is_neox_style", True),
        scaling=None if type(layer) is plain else _rope_scaling(layer),
    )


def _rope_scaling(layer: nn.Module) -> dict[str, Any]:
    """A rotary embedding's long-context variant: its class and the numbers it keeps."""
    numbers = {name: fact for name, fact in vars(layer).items() if type(fact) in (int, float) and name[0] != "_"}
    return {"kind": type(layer).__name__, **numbers}


def activation(recorder: Recorder, x: Tensor, name: str) -> Tensor:
    """A non-linearity by its name in the IR; one that ends in ``_and_mul`` halves the last dimension."""
    value = build.activation(recorder.value(x), name)
    return recorder.new(value, x, x.shape[-1] // 2 if name.endswith("_and_mul") else x.shape[-1])


def attention(
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layer: str,
    spec: AttentionSpec,
    max_length: int,
    sinks: Weight | None = None,
    slopes: Sequence[float] | None = None,
) -> Tensor:
    """Keys and values appended to the layer's cache, and the queries' attention over it: [tokens, heads * head_size].

    ``query``, ``key``, ``value``: [tokens, heads * head_size], or with heads a dimension of their own. For the rest see
    :func:`attend`. What is in another element type than the layer's is converted, and the result back to the query's.
    """

    def heads(given: Tensor, count: int, size: int) -> ir.Value:
        shape = [None, count, size]
        x = build.reshape(recorder.value(given), shape)
        if recorder.element(given) == spec.dtype:
            return x
        return build.elementwise("convert", x, result_type=tensor(shape, spec.dtype))

    queries = heads(query, spec.num_heads, spec.cache.key_size)
    keys = heads(key, spec.num_kv_heads, spec.cache.key_size)
    values = heads(value, spec.num_kv_heads, spec.cache.value_size)
    result = attend(
        recorder.decoder,
        queries,
        keys,
        values,
        layer=layer,
        spec=spec,
        max_length=max_length,
        sinks=sinks,
        slopes=slopes,
    )
    size = spec.num_heads * spec.cache.value_size
    output = torch.empty(query.shape[0], size, dtype=query.dtype, device="meta")
    result = build.reshape(result, [None, size])
    if recorder.element(query) != spec.dtype:
        result = build.elementwise("convert", result, result_type=recorder.type_of(output))
    return recorder.set(output, result)


def attend(
    d: Decoder,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    *,
    layer: str,
    spec: AttentionSpec,
    max_length: int,
    sinks: Weight | None = None,
    slopes: Sequence[float] | None = None,
) -> ir.Value:
    """Attention over a layer's own cache, [tokens, heads, value_size], for ``query`` [tokens, heads, key_size].

    ``key`` and ``value``: [tokens, KV heads, key_size] and [.., value_size]. ``layer`` is the name by which a backend
    will ask the plan for the kernel; ``max_length`` the longest sequence, in tokens; ``sinks`` the layer's weight
    [heads], where ``spec`` says that it has sinks; ``slopes`` one a query head, where it has ALiBi.
    """
    cache_type = PagedKVCache.build(spec.cache, max_length=max_length)
    return build.paged_attention(
        query,
        build.append_kv(d.cache(layer, cache_type), key, value, d.slots, layer=layer),
        d.block_table,
        d.query_start,
        d.sequence_lengths,
        layer=layer,
        scale=spec.scale,
        mask=spec.mask,
        score_stages=spec.score_stages,
        sinks=sinks,
        slopes=slopes,
    )


def logits(
    recorder: Recorder,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shards: int = 1,
    rank: int = 0,
    scale: float = 1.0,
    soft_cap: float = 0.0,
) -> Tensor:
    """Scores over this rank's part of the vocabulary, scaled, then capped; gathering them is the framework's.

    ``weight`` [vocabulary, hidden], ``bias`` [vocabulary].
    """
    value = build.logits(
        recorder.value(hidden),
        recorder.weight(weight, shards=shards, index=rank),
        None if bias is None else recorder.weight(bias),
        scale=scale,
        soft_cap=soft_cap,
    )
    return recorder.new(value, hidden, weight.shape[0])


# ---- torch.nn's own classes

HANDLERS: dict[type, Handler] = {}


def handles(table: dict[type, Handler], *classes: type) -> Callable[[Handler], Handler]:
    """Decorator: the function records layers of exactly these classes, because a subclass computes something else."""

    def register(handler: Handler) -> Handler:
        table.update(dict.fromkeys(classes, handler))
        return handler

    return register


@handles(HANDLERS, nn.Embedding)
def _embedding(recorder: Recorder, path: str, layer: nn.Embedding, ids: Tensor) -> Tensor:
    return embedding(recorder, ids, layer.weight)


@handles(HANDLERS, nn.Linear)
def _linear(recorder: Recorder, path: str, layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(recorder, x, layer.weight, layer.bias)


@handles(HANDLERS, nn.LayerNorm)
def _layer_norm(recorder: Recorder, path: str, layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(recorder, x, layer.weight, layer.bias, epsilon=layer.eps)


_ACTIVATIONS: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh"}


@handles(HANDLERS, *_ACTIVATIONS)
def _activation(recorder: Recorder, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    return activation(recorder, x, _ACTIVATIONS[type(layer)])


@handles(HANDLERS, nn.GELU)
def _gelu(recorder: Recorder, path: str, layer: nn.GELU, x: Tensor) -> Tensor:
    return activation(recorder, x, "gelu_tanh" if layer.approximate == "tanh" else "gelu")


@handles(HANDLERS, nn.Identity, nn.Dropout)
def _nothing(recorder: Recorder, path: str, layer: nn.Module, x: Tensor) -> Tensor:
    return x
