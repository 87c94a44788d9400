"""SGLang's layer classes as llm ops: one handler a class, looked up by exact class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sglang.srt.layers import activation, layernorm, linear, radix_attention
from sglang.srt.layers import vocab_parallel_embedding as embedding
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding import base as rotary
from sglang.srt.layers.rotary_embedding import rope_variant, yarn

from llmir.frontends.common import layers as emit
from llmir.frontends.common.layers import handles
from llmir.frontends.common.levels import AttentionLayer
from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.sglang import experts, support
from llmir.ir.attention_spec import AttentionSpec

_HANDLERS: dict[type, Handler] = {**emit.HANDLERS, **experts.HANDLERS}


@dataclass(frozen=True)
class AttentionOptions:
    """What SGLang's attention layers do not say themselves."""

    dtype: torch.dtype
    """The model's."""
    page_size: int
    """Tokens."""
    max_length: int
    """The longest sequence, in tokens."""
    isa: str
    """What their kernels are compiled for."""
    quantized: bool = False
    """Whether the KV cache is."""

    def handlers(self) -> dict[type, Handler]:
        """The table of handlers."""
        return {**_HANDLERS, radix_attention.RadixAttention: self._attention}

    def check(self, path: str, layer: Any) -> None:
        """Raise UnsupportedLayerError if no llmir kernel computes this ``RadixAttention``."""
        support.check_attention(path, layer, self._spec(layer), self.isa)

    def describe(self, layer: Any) -> AttentionLayer:
        """A ``RadixAttention``, without having seen what it is called with."""
        return AttentionLayer(self._spec(layer), self.max_length)

    def _spec(self, layer: Any, *, sinks: bool = False) -> AttentionSpec:
        return support.attention_spec(layer, self.dtype, self.page_size, quantized=self.quantized, sinks=sinks)

    def _attention(
        self, recorder: Recorder, path: str, layer: Any, q: Any, k: Any, v: Any, forward_batch: Any, **call: Any
    ) -> torch.Tensor:
        sinks = call.pop("sinks", None)
        support.check_call(path, k, call)
        return emit.attention(
            recorder,
            q,
            k,
            v,
            layer=path,
            spec=self._spec(layer, sinks=sinks is not None),
            max_length=self.max_length,
            sinks=None if sinks is None else recorder.weight(sinks),
        )


@handles(_HANDLERS, embedding.VocabParallelEmbedding)
def _embedding(recorder: Recorder, path: str, layer: Any, ids: torch.Tensor) -> torch.Tensor:
    if layer.output_dtype is not None:
        raise NotInDialectError(f"it gives {layer.output_dtype}, not the type of its weights")
    return emit.embedding(recorder, ids, layer.weight, shards=layer.tp_size, rank=_rank(layer))


@handles(
    _HANDLERS,
    linear.ReplicatedLinear,
    linear.ColumnParallelLinear,
    linear.MergedColumnParallelLinear,
    linear.QKVParallelLinear,
)
def _linear(recorder: Recorder, path: str, layer: Any, x: torch.Tensor) -> Any:
    replicated = isinstance(layer, linear.ReplicatedLinear)
    shards, rank = (1, 0) if replicated else (_shards(layer), _rank(layer))
    if shards > 1 and layer.gather_output:
        raise NotInDialectError("it gathers its output from all tensor-parallel ranks")
    outputs = layer.output_size if shards == 1 else layer.output_size_per_partition
    try:
        weight = emit.linear_weight(layer, plain=_is_plain(layer), outputs=outputs, inputs=layer.input_size)
    except NotInDialectError:
        return _with_bias(layer, emit.opaque_linear(recorder, layer, x, outputs))
    bias = None if layer.skip_bias_add else layer.bias
    return _with_bias(layer, emit.linear(recorder, x, weight, bias, shards=shards, rank=rank))


@handles(_HANDLERS, linear.RowParallelLinear)
def _row_linear(
    recorder: Recorder, path: str, layer: Any, x: torch.Tensor, skip_all_reduce: bool = False, **call: Any
) -> Any:
    reduce = layer.reduce_results and not skip_all_reduce
    outputs, inputs = layer.output_size, layer.input_size_per_partition
    try:
        weight = emit.linear_weight(layer, plain=_is_plain(layer), outputs=outputs, inputs=inputs)
    except NotInDialectError:
        ranks = _shards(layer) if reduce else 1
        return _with_bias(layer, emit.opaque_linear(recorder, layer, x, outputs, ranks=ranks))
    output = emit.row_linear(
        recorder,
        x,
        weight,
        None if layer.skip_bias_add else layer.bias,
        shards=_shards(layer),
        rank=_rank(layer),
        input_is_parallel=layer.input_is_parallel,
        reduce=reduce,
    )
    return _with_bias(layer, output)


def _with_bias(layer: Any, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What SGLang's linear layers return: the output, and where asked for, a bias that is still to be added."""
    return output, layer.bias if layer.skip_bias_add else None


def _is_plain(layer: Any) -> bool:
    """Whether a linear layer's weights are not quantized."""
    return isinstance(layer.quant_method, UnquantizedLinearMethod)


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
        raise NotInDialectError("it normalizes by the variance of part of its input")
    if post_residual_addition is not None or quant_linear is not None:
        raise NotInDialectError("it also adds to the residual, or quantizes its output")
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
        raise NotInDialectError("it also writes the KV cache, or shifts positions")
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
