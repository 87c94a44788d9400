"""vLLM's layer classes as llm ops: one handler a class, looked up by exact class.

By exact class, because a subclass exists to compute something else. Shapes: hidden states ``[tokens, hidden]``,
queries ``[tokens, heads * head_size]``; a leading dimension of heads of its own is kept as it comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers import activation, layernorm, linear, rotary_embedding
from vllm.model_executor.layers import vocab_parallel_embedding as embedding
from vllm.model_executor.layers.attention import Attention, EncoderOnlyAttention
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from llmir.errors import UnsupportedLayerError
from llmir.frontends.vllm.recording import ELEMENT_NAMES, Handler, Recorder
from llmir.frontends.vllm.support import check_attention
from llmir.ir import build
from llmir.ir.bindings import ir
from llmir.ir.types import PagedKVCache

HANDLERS: dict[type, Handler] = {}


def handles(*classes: type) -> Callable[[Handler], Handler]:
    """Decorator: the function records layers of these classes."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(classes, handler))
        return handler

    return register


@handles(embedding.VocabParallelEmbedding)
def _embedding(recorder: Recorder, path: str, layer: Any, ids: torch.Tensor) -> torch.Tensor:
    weight = recorder.weight(layer.weight, dim=0, shards=layer.tp_size, index=layer.tp_rank)
    value = build.embedding(recorder.value(ids), weight)
    if layer.tp_size > 1:  # each rank looks up its own part of the vocabulary and has zeros for the rest
        value = build.all_reduce(value, ranks=layer.tp_size)
    return recorder.set(torch.empty(*ids.shape, layer.weight.shape[-1], dtype=layer.weight.dtype, device="meta"), value)


@handles(nn.Embedding)
def _plain_embedding(recorder: Recorder, path: str, layer: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    value = build.embedding(recorder.value(ids), recorder.weight(layer.weight))
    return recorder.set(torch.empty(*ids.shape, layer.embedding_dim, dtype=layer.weight.dtype, device="meta"), value)


@handles(
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
    linear.RowParallelLinear,
)
def _linear(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> Any:
    if not isinstance(layer.quant_method, linear.UnquantizedLinearMethod):
        method = type(layer.quant_method).__name__
        raise UnsupportedLayerError(path, f"its weights are quantized ({method}), and llmir reads plain ones")
    is_row = isinstance(layer, linear.RowParallelLinear)
    replicated = isinstance(layer, linear.ReplicatedLinear)
    shards, rank = (1, 0) if replicated else (layer.tp_size, layer.tp_rank)
    value = recorder.value(x)
    if is_row and shards > 1 and not layer.input_is_parallel:
        part = x.shape[-1] // shards
        value = build.slice(value, rank * part, part)
    weight = recorder.weight(layer.weight, dim=1 if is_row else 0, shards=shards, index=rank)
    value = build.linear(
        value, weight, None if layer.skip_bias_add else _linear_bias(recorder, layer, shards, rank, is_row)
    )
    if is_row and shards > 1 and layer.reduce_results:
        value = build.all_reduce(value, ranks=shards)
    if not is_row and not replicated and shards > 1 and layer.gather_output:
        raise UnsupportedLayerError(path, "it gathers its output from all tensor-parallel ranks")
    output = recorder.new(value, x, layer.weight.shape[0])
    if not layer.return_bias:
        return output
    return output, layer.bias if layer.skip_bias_add else None


def _linear_bias(recorder: Recorder, layer: Any, shards: int, rank: int, is_row: bool) -> Any:
    """The bias as a weight: cut like the outputs, or, where ranks sum their results, on the first rank alone."""
    if layer.bias is None or (is_row and rank > 0):
        return None
    return recorder.weight(layer.bias, shards=1 if is_row else shards, index=rank)


@handles(nn.Linear)
def _plain_linear(recorder: Recorder, path: str, layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    bias = None if layer.bias is None else recorder.weight(layer.bias)
    value = build.linear(recorder.value(x), recorder.weight(layer.weight), bias)
    return recorder.new(value, x, layer.out_features)


@handles(layernorm.RMSNorm, layernorm.GemmaRMSNorm)
def _rms_norm(recorder: Recorder, path: str, layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if getattr(layer, "variance_size_override", None) is not None:
        raise UnsupportedLayerError(path, "it normalizes by the variance of part of its input")
    value = build.rms_norm(
        recorder.value(x),
        recorder.weight(layer.weight) if getattr(layer, "has_weight", True) else None,
        epsilon=layer.variance_epsilon,
        residual=None if residual is None else recorder.value(residual),
        weight_offset=1.0 if isinstance(layer, layernorm.GemmaRMSNorm) else 0.0,
    )
    if residual is None:
        return recorder.new(value, x)
    return recorder.new(value[0], x), recorder.new(value[1], x)


@handles(layernorm.LayerNorm, nn.LayerNorm)
def _layer_norm(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (None if p is None else recorder.weight(p) for p in (layer.weight, layer.bias))
    return recorder.new(build.layer_norm(recorder.value(x), weight, bias, epsilon=layer.eps), x)


@handles(
    rotary_embedding.RotaryEmbedding,
    rotary_embedding.LinearScalingRotaryEmbedding,
    rotary_embedding.NTKScalingRotaryEmbedding,
    rotary_embedding.DynamicNTKScalingRotaryEmbedding,
    rotary_embedding.DynamicNTKAlphaRotaryEmbedding,
    rotary_embedding.Llama3RotaryEmbedding,
    rotary_embedding.YaRNScalingRotaryEmbedding,
    rotary_embedding.Phi3LongRoPEScaledRotaryEmbedding,
)
def _rope(
    recorder: Recorder,
    path: str,
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None = None,
) -> Any:
    value = build.rope(
        recorder.value(positions),
        recorder.value(query),
        None if key is None else recorder.value(key),
        head_size=layer.head_size,
        rotary_size=layer.rotary_dim,
        base=layer.base,
        style="half" if getattr(layer, "is_neox_style", True) else "interleaved",
        scaling=_rope_scaling(layer),
    )
    if key is None:
        return recorder.new(value, query), None
    return recorder.new(value[0], query), recorder.new(value[1], key)


def _rope_scaling(layer: Any) -> dict[str, Any] | None:
    """A long-context variant by its class and the numbers it keeps; None for plain rotary embedding."""
    if type(layer) is rotary_embedding.RotaryEmbedding:
        return None
    numbers = {name: fact for name, fact in vars(layer).items() if type(fact) in (int, float) and name[0] != "_"}
    return {"kind": type(layer).__name__, **numbers}


_ACTIVATIONS: dict[type, str] = {
    activation.SiluAndMul: "silu_and_mul",
    activation.GELU: "gelu",
    activation.GELUTanh: "gelu_tanh",
    activation.NewGELU: "gelu_new",
    activation.QuickGELU: "quick_gelu",
    activation.ReLUSquaredActivation: "relu2",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
}


@handles(*_ACTIVATIONS, activation.GeluAndMul, nn.GELU)
def _activation(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    name = _ACTIVATIONS.get(type(layer))
    if name is None:
        gelu = "gelu_tanh" if layer.approximate == "tanh" else "gelu"
        name = f"{gelu}_and_mul" if isinstance(layer, activation.GeluAndMul) else gelu
    value = build.activation(recorder.value(x), name)
    return recorder.new(value, x, x.shape[-1] // 2 if name.endswith("_and_mul") else x.shape[-1])


@handles(nn.Identity, nn.Dropout)
def _nothing(recorder: Recorder, path: str, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x


@handles(Attention, EncoderOnlyAttention)
def _attention(
    recorder: Recorder, path: str, layer: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    check_attention(layer.layer_name, layer)
    d = recorder.decoder
    cache = d.cache(layer.layer_name, _cache_type(layer))

    def heads(tensor: torch.Tensor, count: int) -> ir.Value:
        return build.reshape(recorder.value(tensor), [None, count, layer.head_size])

    cache = build.append_kv(
        cache, heads(key, layer.num_kv_heads), heads(value, layer.num_kv_heads), d.slots, layer=layer.layer_name
    )
    result = build.paged_attention(
        heads(query, layer.num_heads),
        cache,
        d.block_table,
        d.query_start,
        d.sequence_lengths,
        layer=layer.layer_name,
        scale=layer.impl.scale,
        window=layer.sliding_window or 0,
        soft_cap=layer.impl.logits_soft_cap or 0.0,
    )
    size = layer.num_heads * layer.head_size
    output = torch.empty(query.shape[0], size, dtype=query.dtype, device="meta")
    return recorder.set(output, build.reshape(result, [None, size]))


def _cache_type(layer: Any) -> PagedKVCache:
    from vllm.config import get_current_vllm_config

    config = get_current_vllm_config()
    return PagedKVCache.build(
        element_type=ELEMENT_NAMES[layer.kv_cache_torch_dtype],
        kv_heads=layer.num_kv_heads,
        head_size=layer.head_size,
        block_size=config.cache_config.block_size,
        max_length=config.model_config.max_model_len,
    )


@handles(LogitsProcessor)
def _logits(
    recorder: Recorder, path: str, layer: Any, head: Any, hidden: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Scores over this rank's part of the vocabulary; gathering them is the framework's."""
    soft_cap = layer.soft_cap or 0.0
    value = build.logits(
        recorder.value(hidden),
        recorder.weight(head.weight, shards=head.tp_size, index=head.tp_rank),
        None if bias is None else recorder.weight(bias),
        scale=1.0 if soft_cap else layer.scale,
        soft_cap=soft_cap,
    )
    if soft_cap and layer.scale != 1.0:  # vLLM scales what it has capped, the op caps what it has scaled
        value = build.elementwise("mul", value, scalar=layer.scale)
    return recorder.new(value, hidden, head.weight.shape[0])
