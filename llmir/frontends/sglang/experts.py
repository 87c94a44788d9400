"""SGLang's mixtures of experts as llm ops: one layer chooses experts for each token, another holds them."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from llmir.frontends.common import experts as emit
from llmir.frontends.common.layers import handles, quant_method
from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.recording import Handler, Recorder

HANDLERS: dict[type, Handler] = {}


@handles(HANDLERS, TopK)
def _top_k(
    recorder: Recorder, path: str, layer: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, **call: Any
) -> StandardTopKOutput:
    config = layer.topk_config
    if config.num_shared_topk_slots or layer.enable_waterfill:
        raise NotInDialectError("experts for all tokens are among those it chooses from")
    if call.get("dynamic_expert_bias") is not None or call.get("router_logits_partials") is not None:
        raise NotInDialectError("it chooses by more than the scores of the gate")
    grouped, scale = config.use_grouped_topk, config.routed_scaling_factor
    shares, choices = emit.route(
        recorder,
        router_logits,
        top_k=config.top_k,
        scoring=config.scoring_func,
        groups=config.num_expert_group if grouped else 1,
        top_groups=config.topk_group if grouped else 1,
        renormalize=config.renormalize,
        scale=scale if scale is not None and config.apply_routed_scaling_factor_on_output else 1.0,
        bias=config.correction_bias,
        function=config.custom_routing_function,
    )
    return StandardTopKOutput(shares, choices, router_logits)


@handles(HANDLERS, FusedMoE)
def _fused_moe(
    recorder: Recorder, path: str, layer: Any, hidden_states: torch.Tensor, topk_output: Any, *rest: Any, **call: Any
) -> torch.Tensor:
    config = layer.moe_runner_config
    if not isinstance(topk_output, StandardTopKOutput) or not recorder.knows(topk_output.topk_weights):
        raise NotInDialectError("which experts tokens go through was not seen")
    if layer.num_fused_shared_experts or config.apply_router_weight_on_input or config.no_combine:
        raise NotInDialectError("it does more than sum what the chosen experts give")
    if config.routed_scaling_factor not in (None, 1.0) and not layer.should_fuse_routed_scaling_factor_in_topk:
        raise NotInDialectError("it scales what the experts give")
    if layer.reduce_results and layer.moe_tp_size * layer.moe_ep_size > 1:
        raise NotInDialectError("it sums over ranks itself")
    plain = isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
    experts = emit.Experts.of(
        layer,
        local=layer.num_local_experts,
        hidden=layer.hidden_size,
        intermediate=layer.intermediate_size_per_partition,
        gated=config.is_gated,
        method=None if plain else quant_method(layer),
        count=layer.num_experts,
        activation=config.activation,
        shards=layer.moe_tp_size,
        rank=layer.moe_tp_rank,
        expert_shards=layer.moe_ep_size,
        expert_rank=layer.moe_ep_rank,
    )
    return emit.moe(recorder, hidden_states, topk_output.topk_weights, topk_output.topk_ids, experts)
