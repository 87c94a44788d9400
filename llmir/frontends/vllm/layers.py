"""vLLM's layer classes as llm ops: one handler a class, looked up by exact class."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers import activation, layernorm, linear, rotary_embedding
from vllm.model_executor.layers import vocab_parallel_embedding as embedding
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common import layers as emit
from llmir.frontends.common.layers import handles
from llmir.frontends.common.levels import AttentionLayer, weight_of
from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.common.watching import UnwatchedError
from llmir.frontends.vllm import experts
from llmir.frontends.vllm.support import attention_spec
from llmir.ir import build

HANDLERS: dict[type, Handler] = {**emit.HANDLERS, **experts.HANDLERS}


def _rank(layer: Any) -> int:
    """Which of the layer's tensor-parallel ranks this is; vLLM 0.26 does not keep it on embeddings."""
    return layer.tp_rank if hasattr(layer, "tp_rank") else get_tp_group().rank_in_group


@handles(HANDLERS, embedding.VocabParallelEmbedding)
def _embedding(recorder: Recorder, path: str, layer: Any, ids: torch.Tensor) -> torch.Tensor:
    return emit.embedding(recorder, ids, layer.weight, shards=layer.tp_size, rank=_rank(layer))


@handles(
    HANDLERS,
    linear.ReplicatedLinear,
    GateLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
)
def _linear(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> Any:
    shards, rank = (1, 0) if isinstance(layer, linear.ReplicatedLinear) else (layer.tp_size, layer.tp_rank)
    if shards > 1 and layer.gather_output:
        raise NotInDialectError("it gathers its output from all tensor-parallel ranks")
    outputs = layer.output_size if shards == 1 else layer.output_size_per_partition
    try:
        weight = emit.linear_weight(layer, plain=_is_plain(layer), outputs=outputs, inputs=layer.input_size)
    except NotInDialectError:
        return _with_bias(layer, emit.opaque_linear(recorder, layer, x, outputs))
    bias, dtype = None if layer.skip_bias_add else layer.bias, getattr(layer, "out_dtype", None)
    return _with_bias(layer, emit.linear(recorder, x, weight, bias, shards=shards, rank=rank, dtype=dtype))


def _is_plain(layer: Any) -> bool:
    """Whether a linear layer's weights are not quantized."""
    return isinstance(layer.quant_method, linear.UnquantizedLinearMethod)


@handles(HANDLERS, linear.RowParallelLinear)
def _row_linear(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> Any:
    outputs, inputs = layer.output_size, layer.input_size_per_partition
    try:
        weight = emit.linear_weight(layer, plain=_is_plain(layer), outputs=outputs, inputs=inputs)
    except NotInDialectError:
        ranks = layer.tp_size if layer.reduce_results else 1
        return _with_bias(layer, emit.opaque_linear(recorder, layer, x, outputs, ranks=ranks))
    output = emit.row_linear(
        recorder,
        x,
        weight,
        None if layer.skip_bias_add else layer.bias,
        shards=layer.tp_size,
        rank=layer.tp_rank,
        input_is_parallel=layer.input_is_parallel,
        reduce=layer.reduce_results,
    )
    return _with_bias(layer, output)


def _with_bias(layer: Any, output: torch.Tensor) -> Any:
    """What vLLM's linear layers return: the output, and where asked for, a bias that is still to be added."""
    if not layer.return_bias:
        return output
    return output, layer.bias if layer.skip_bias_add else None


@handles(HANDLERS, layernorm.RMSNorm, layernorm.GemmaRMSNorm)
def _rms_norm(recorder: Recorder, path: str, layer: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    if getattr(layer, "variance_size_override", None) is not None:
        raise NotInDialectError("it normalizes by the variance of part of its input")
    return emit.rms_norm(
        recorder,
        x,
        layer.weight if getattr(layer, "has_weight", True) else None,
        epsilon=layer.variance_epsilon,
        residual=residual,
        weight_offset=1.0 if isinstance(layer, layernorm.GemmaRMSNorm) else 0.0,
    )


@handles(HANDLERS, layernorm.LayerNorm)
def _layer_norm(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return emit.layer_norm(recorder, x, layer.weight, layer.bias, epsilon=layer.eps)


@handles(
    HANDLERS,
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
    return emit.rotary_embedding(recorder, layer, rotary_embedding.RotaryEmbedding, positions, query, key)


_ACTIVATIONS: dict[type, str] = {
    activation.SiluAndMul: "silu_and_mul",
    activation.GELU: "gelu",
    activation.GELUTanh: "gelu_tanh",
    activation.NewGELU: "gelu_new",
    activation.QuickGELU: "quick_gelu",
    activation.ReLUSquaredActivation: "relu2",
}


@handles(HANDLERS, *_ACTIVATIONS)
def _activation(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return emit.activation(recorder, x, _ACTIVATIONS[type(layer)])


@handles(HANDLERS, activation.GeluAndMul)
def _gelu_and_mul(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return emit.activation(recorder, x, "gelu_tanh_and_mul" if layer.approximate == "tanh" else "gelu_and_mul")


def describe(layer: Any, model: torch.nn.Module) -> AttentionLayer:
    """An ``Attention`` layer of a model, without having seen what it is called with."""
    config = get_current_vllm_config()
    dtype = config.model_config.dtype
    assert isinstance(dtype, torch.dtype), "vLLM resolves the dtype before any plugin sees the configuration"
    return AttentionLayer(
        spec=attention_spec(layer, dtype, config.cache_config.block_size),
        max_length=config.model_config.max_model_len,
        sinks=weight_of(model, layer.impl.sinks) if layer.has_sink else None,
        slopes=layer.impl.alibi_slopes,
    )


@handles(HANDLERS, Attention)
def _attention(
    recorder: Recorder,
    path: str,
    layer: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output_shape: torch.Size | None = None,
    output_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    config = get_current_vllm_config()
    spec = attention_spec(layer, query.dtype, config.cache_config.block_size)
    # The operation's result is as vLLM's is when it is asked for nothing: what else there is cannot be recorded.
    usual = (query.shape[0], spec.num_heads * spec.cache.value_size)
    if tuple(output_shape or usual) != usual or (output_dtype or query.dtype) != query.dtype:
        raise UnwatchedError(f"{layer.layer_name} is asked for {output_dtype or query.dtype} of {output_shape}")
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor is None or recorder.element(tensor) != spec.dtype:
            found = "missing" if tensor is None else f"in {recorder.element(tensor)}"
            reason = f"its {name} is {found}, and a kernel for its KV cache reads {spec.dtype}"
            raise UnsupportedLayerError(layer.layer_name, reason)
    sinks = None
    if layer.has_sink:
        ranks = get_tp_group()
        sinks = recorder.weight(layer.impl.sinks, shards=ranks.world_size, index=ranks.rank_in_group)
    return emit.attention(
        recorder,
        query,
        key,
        value,
        layer=layer.layer_name,
        spec=spec,
        max_length=config.model_config.max_model_len,
        sinks=sinks,
        slopes=layer.impl.alibi_slopes,
    )


@handles(HANDLERS, LogitsProcessor)
def _logits(
    recorder: Recorder, path: str, layer: Any, head: Any, hidden: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    soft_cap = layer.soft_cap or 0.0
    scores = emit.logits(
        recorder,
        hidden,
        head.weight,
        bias,
        shards=head.tp_size,
        rank=_rank(head),
        scale=1.0 if soft_cap else layer.scale,
        soft_cap=soft_cap,
    )
    if soft_cap and layer.scale != 1.0:  # vLLM scales what it has capped, the op caps what it has scaled
        recorder.set(scores, build.elementwise("mul", recorder.value(scores), scalar=layer.scale))
    return scores
