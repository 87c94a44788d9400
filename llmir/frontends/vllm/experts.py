"""vLLM's mixtures of experts as llm ops.

One layer of vLLM's, the runner, holds the experts and the router, and often the gate, experts for all tokens, and
projections around them. Its own Python is run, so that what it does with them is the model's; only choosing experts and
going through them, which kernels do, become ops in their place. A runner that has more than the ops say stays opaque.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from llmir.frontends.common import experts as emit
from llmir.frontends.common.layers import handles, quant_method
from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.recording import Handler, Recorder
from llmir.frontends.common.support import class_name

HANDLERS: dict[type, Handler] = {}
RUNNERS: tuple[type, ...] = ()
try:
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    RUNNERS = (MoERunner,)
except ImportError:  # an earlier vLLM, whose experts stay opaque
    pass
#: Routers that choose as the layer's own attributes say.
ROUTERS = ("CPURouter", "FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CustomRoutingRouter")


@handles(HANDLERS, *RUNNERS)
def _runner(recorder: Recorder, path: str, layer: Any, *args: Any, **kwargs: Any) -> Any:
    _check(layer)
    held = layer.routed_experts
    experts = _experts(held, layer.moe_config)

    def apply(hidden_states: Any, router_logits: Any, shared_experts_input: Any, *rest: Any, **options: Any) -> Any:
        """In the place of the kernels: what experts for all tokens give, and what the chosen ones give."""
        shared = None if layer.shared_experts is None else layer.shared_experts._layer(shared_experts_input)
        with _disable_current_modes():
            shares, choices = _route(recorder, held, router_logits)
            return shared, emit.moe(recorder, hidden_states, shares, choices, experts)

    # The model is of no use after it was watched, so nothing has to be put back.
    vars(layer)["_apply_quant_method"] = apply
    vars(layer)["_forward_entry"] = lambda *given: layer._forward_impl(*given[:4])
    vars(held)["_ensure_moe_quant_config_init"] = lambda: None
    with recorder:
        return type(layer).forward(layer, *args, **kwargs)


def _check(layer: Any) -> None:
    """Raise NotInDialectError for a runner that does more than its attributes say."""
    held, router, parallel = layer.routed_experts, layer.router, layer.moe_config.moe_parallel_config
    more = {
        f"its experts are chosen by a {class_name(router)}": type(router).__name__ not in ROUTERS,
        "experts move between ranks while it serves": router.eplb_state is not None,
        "tokens are divided among ranks": parallel.dp_size > 1 or parallel.sp_size > 1 or parallel.pcp_size > 1,
        "shares are multiplied into its input": bool(held.apply_router_weight_on_input),
        "experts for all tokens are among those it chooses from": getattr(router, "num_fused_shared_experts", 0) > 0,
        "tokens are routed by what they are": getattr(router, "hash_indices_table", None) is not None,
    }
    for reason, found in more.items():
        if found:
            raise NotInDialectError(reason)


def _experts(held: Any, config: Any) -> emit.Experts:
    """The weights of a runner."""
    parallel = config.moe_parallel_config
    plain = isinstance(held.quant_method, UnquantizedFusedMoEMethod)
    return emit.Experts.of(
        held,
        local=held.local_num_experts,
        hidden=held.hidden_size,
        intermediate=held.intermediate_size_per_partition,
        gated=config.is_act_and_mul,
        method=None if plain else quant_method(held),
        count=held.global_num_experts,
        activation=config.activation.value,
        shards=parallel.tp_size,
        rank=parallel.tp_rank,
        expert_shards=parallel.ep_size if parallel.use_ep else 1,
        expert_rank=parallel.ep_rank if parallel.use_ep else 0,
    )


def _route(recorder: Recorder, held: Any, router_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts tokens go through, as the layer's attributes say."""
    grouped, bias = held.use_grouped_topk, held.e_score_correction_bias
    return emit.route(
        recorder,
        router_logits,
        top_k=held.top_k,
        scoring=held.scoring_func,
        groups=held.num_expert_group if grouped else 1,
        top_groups=held.topk_group if grouped else 1,
        renormalize=held.renormalize,
        # Without groups and bias vLLM's routers leave the factor out.
        scale=held.routed_scaling_factor if grouped or bias is not None else 1.0,
        bias=bias,
        function=held.custom_routing_function,
    )
