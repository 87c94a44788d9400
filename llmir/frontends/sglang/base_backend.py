"""What llmir's attention backends have in common, whatever runs their kernels: layers bound to the plan, and a report.

The plan comes with SGLang's server arguments, put there while they were resolved, so this works the same in every
process SGLang starts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic

from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.agreement import check_agreement
from llmir.frontends.common.sharing_report import SharingReport
from llmir.frontends.common.support import class_name
from llmir.frontends.common.tensors import LayerTensors
from llmir.frontends.sglang import support
from llmir.frontends.sglang.planning import plan_of
from llmir.frontends.sglang.pool import LlmirKVPool
from llmir.plan import PlannedKernel
from llmir.runtime.layers import PlannedLayers, RunnerT

logger = logging.getLogger("sglang.llmir")


class PlannedBackend(AttentionBackend, Generic[RunnerT]):
    """All attention layers of one model runner, each with what runs its kernel."""

    def __init__(self, runner: Any, load: Callable[[PlannedKernel], RunnerT]):
        """``load`` gives what runs one of the plan's kernels."""
        super().__init__()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, LlmirKVPool):
            raise UnsupportedLayerError("all", f"SGLang made a {class_name(pool)}, not llmir's KV pool")
        # By these names SGLang looks for the pools of the backend that is running.
        self.token_to_kv_pool: LlmirKVPool = pool
        self.req_to_token_pool = runner.req_to_token_pool
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._page_size = pool.page_size
        plan = plan_of(runner.server_args)
        ranks = get_parallel()
        if ranks.world_group.world_size > 1:
            check_agreement(plan, ranks.world_group.all_gather_object, logger)
        self._shares_prefixes = any(kernel.policy.sharing is not None for kernel in plan.kernels)
        self._sinks = {layer for kernel in plan.kernels if kernel.spec.attention.sinks for layer in kernel.layers}
        self._planned = PlannedLayers(plan, load)
        self._runners: dict[int, RunnerT] = {}
        self._tensors: dict[int, LayerTensors] = {}
        for path, layer in runner.model.named_modules():
            if isinstance(layer, RadixAttention):
                self._bind(path, layer, runner.model_config.dtype if pool.is_fp8 else pool.dtype)
        for symbol, count in self._planned.kernels.items():
            logger.info("llmir: %s serves %d layers", symbol, count)
        self._sharing = SharingReport(self._planned.sharing, ranks.tp_rank == ranks.pp_rank == 0, logger)

    def _bind(self, path: str, layer: RadixAttention, dtype: Any) -> None:
        quantized = self.token_to_kv_pool.is_fp8
        if layer.layer_id in self._runners:
            raise UnsupportedLayerError(path, f"another layer has its number ({layer.layer_id})")
        # Whether a layer has sinks is seen when it is called; a call unlike the plan is refused then.
        sinks = path in self._sinks
        spec = support.attention_spec(layer, dtype, self._page_size, quantized=quantized, sinks=sinks)
        runner = self._runners[layer.layer_id] = self._planned.bind(path, spec)
        support.check_attention(path, layer, spec, runner.spec.isa)
        device = self.token_to_kv_pool.pages[0].device
        self._tensors[layer.layer_id] = LayerTensors(path, runner.spec.attention, device)

    def _may_prepare(self, batch: Any) -> bool:
        """Whether a batch has anything to attend to; raises UnsupportedLayerError for one that llmir cannot serve."""
        if batch.forward_mode.is_idle():
            return False
        if batch.spec_info is not None:
            raise UnsupportedLayerError("all", "a batch comes from speculative decoding")
        return True
