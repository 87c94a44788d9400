"""SGLang's layer classes as llm ops: one handler a class, looked up by exact class."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers import activation, layernorm, linear, radix_attention
from sglang.srt.layers import vocab_parallel_embedding as embedding
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding import base as rotary
from sglang.srt.layers.rotary_embedding import rope_variant, yarn

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common import layers as emit
from llmir.frontends.common.layers import handles
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.sglang import support

_HANDLERS: dict[type, Handler] = dict(emit.HANDLERS)


def handlers(
    *, dtype: torch.dtype, page_size: int, max_length: int, on_gpu: bool = False, quantized: bool = False
) -> dict[type, Handler]:
    """The table of handlers for a model of ``dtype`` with pages and longest sequences of so many tokens.

    ``on_gpu``: where its kernels will run; ``quantized``: whether its KV cache is.
    """

    def attention(
        recorder: Recorder, path: str, layer: Any, query: Any, key: Any, value: Any, batch: Any, **call: Any
    ) -> torch.Tensor:
        support.check_attention(path, layer, quantized=quantized)
        sinks = call.pop("sinks", None) if on_gpu else None
        support.check_call(path, key, call)
        spec = support.attention_spec(layer, dtype, page_size, quantized=quantized, sinks=sinks is not None)
        return emit.attention(
            recorder,
            query,
            key,
            value,
            layer=path,
            spec=spec,
            max_length=max_length,
            sinks=None if sinks is None else recorder.weight(sinks),
        )

    return {**_HANDLERS, radix_attention.RadixAttention: attention}


@handles(_HANDLERS, embedding.VocabParallelEmbedding)
def _embedding(recorder: Recorder, path: str, layer: Any, ids: torch.Tensor) -> torch.Tensor:
    if layer.output_dtype is not None:
        raise UnsupportedLayerError(path, f"it gives {layer.output_dtype}, not the type of its weights")
    return emit.embedding(recorder, ids, layer.weight, shards=layer.tp_size, rank=_rank(layer))


@handles(
    _HANDLERS,
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
)
def _linear(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> Any:
    emit.require_plain_weights(recorder, layer, UnquantizedLinearMethod)
    replicated = isinstance(layer, linear.ReplicatedLinear)
    shards, rank = (1, 0) if replicated else (_shards(layer), _rank(layer))
    if shards > 1 and layer.gather_output:
        raise UnsupportedLayerError(path, "it gathers its output from all tensor-parallel ranks")
    bias = None if layer.skip_bias_add else layer.bias
    return _with_bias(layer, emit.linear(recorder, x, layer.weight, bias, shards=shards, rank=rank))


@handles(_HANDLERS, linear.RowParallelLinear)
def _row_linear(
    recorder: Recorder, path: str, layer: Any, x: torch.Tensor, skip_all_reduce: bool = False, **call: Any
) -> Any:
    emit.require_plain_weights(recorder, layer, UnquantizedLinearMethod)
    output = emit.row_linear(
        recorder,
        x,
        layer.weight,
        None if layer.skip_bias_add else layer.bias,
        shards=_shards(layer),
        rank=_rank(layer),
        input_is_parallel=layer.input_is_parallel,
        reduce=layer.reduce_results and not skip_all_reduce,
    )
    return _with_bias(layer, output)


def _with_bias(layer: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What SGLang's linear layers return: the output, and where asked for, a bias that is still to be added."""
    return output, layer.bias if layer.skip_bias_add else None


def _shards(layer: Any) -> int:
    return linear.get_group_rank_size(layer.tp_group)[1]


def _rank(layer: Any) -> int:
    return linear.get_group_rank_size(layer.tp_group)[0] if layer.tp_group is not None else 0


@handles(_HANDLERS, layernorm.RMSNorm, layernorm.GemmaRMSNorm)
def _rms_norm(
    recorder: Recorder,
    path: str,
    layer: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
    quant_linear: Any = None,
) -> Any:
    if getattr(layer, "variance_size_override", None) is not None:
        raise UnsupportedLayerError(path, "it normalizes by the variance of part of its input")
    if post_residual_addition is not None or quant_linear is not None:
        raise UnsupportedLayerError(path, "it also adds to the residual, or quantizes its output")
    return emit.rms_norm(
        recorder,
        x,
        layer.weight if getattr(layer, "has_weight", True) else None,
        epsilon=layer.variance_epsilon,
        residual=residual,
        weight_offset=1.0 if isinstance(layer, layernorm.GemmaRMSNorm) else 0.0,
    )


@handles(_HANDLERS, layernorm.LayerNorm)
def _layer_norm(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    weight = layer.weight if layer.elementwise_affine else None
    return emit.layer_norm(recorder, x, weight, layer.bias if layer.use_bias else None, epsilon=layer.variance_epsilon)


@handles(
    _HANDLERS,
    rotary.RotaryEmbedding,
    rotary.LinearScalingRotaryEmbedding,
    rope_variant.DynamicNTKScalingRotaryEmbedding,
    rope_variant.DynamicNTKAlphaRotaryEmbedding,
    rope_variant.Llama3RotaryEmbedding,
    rope_variant.Phi3LongRoPEScaledRotaryEmbedding,
    yarn.YaRNScalingRotaryEmbedding,
)
def _rope(
    recorder: Recorder,
    path: str,
    layer: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> Any:
    if offsets is not None or fused_set_kv_buffer_arg is not None:
        raise UnsupportedLayerError(path, "it also writes the KV cache, or shifts positions")
    return emit.rotary_embedding(recorder, layer, rotary.RotaryEmbedding, positions, query, key)


_ACTIVATIONS: dict[type, str] = {
    activation.SiluAndMul: "silu_and_mul",
    activation.NewGELU: "gelu_new",
    activation.QuickGELU: "quick_gelu",
    activation.ReLU2: "relu2",
}


@handles(_HANDLERS, *_ACTIVATIONS)
def _activation(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return emit.activation(recorder, x, _ACTIVATIONS[type(layer)])


@handles(_HANDLERS, activation.GeluAndMul)
def _gelu_and_mul(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> torch.Tensor:
    return emit.activation(recorder, x, "gelu_tanh_and_mul" if layer.approximate == "tanh" else "gelu_and_mul")


@handles(_HANDLERS, LogitsProcessor)
def _logits(
    recorder: Recorder, path: str, layer: Any, ids: torch.Tensor, hidden: torch.Tensor, head: Any, *rest: Any
) -> torch.Tensor:
    return emit.logits(
        recorder,
        hidden,
        head.weight,
        getattr(head, "bias", None),
        shards=getattr(head, "tp_size", 1),
        rank=_rank(head),
        scale=1.0 if layer.logit_scale is None else layer.logit_scale,
        soft_cap=layer.final_logit_softcapping or 0.0,
    )
