"""What vLLM calls: its attention backend interface, answered with llmir's compiled kernels.

The plan comes with vLLM's configuration (``additional_config["llmir_plan"]``, put there before the engine
started), so this works the same in every process vLLM starts. vLLM builds one metadata object a step and calls
``forward`` once a layer; here the metadata is a work list and ``forward`` is one kernel call, which also appends
the new keys and values to the cache.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from llmir.compiler import object_cache
from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.sharing_report import SharingReport
from llmir.frontends.common.support import ELEMENT_TYPES, dtype_name
from llmir.frontends.vllm.planning import PLAN_KEY
from llmir.frontends.vllm.plugin import BACKEND_NAME, is_llmir
from llmir.ir.signature import HEAD_SIZES
from llmir.plan import Plan
from llmir.runtime.attention import AttentionRunner
from llmir.runtime.layers import LayerFacts, PlannedLayers, heads

logger = logging.getLogger("vllm.llmir")


class LlmirAttentionBackend(AttentionBackend):
    """vLLM's description of llmir: what it can be asked for, and the classes that do it."""

    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        """The name of the backend selected: LLMIR, or CUSTOM where the user spelled it so."""
        config = get_current_vllm_config_or_none()
        backend = config.attention_config.backend if config is not None else None
        return backend.name if backend is not None and is_llmir(backend) else BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type[LlmirAttentionImpl]:
        """The class that attends."""
        return LlmirAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LlmirMetadataBuilder]:
        """The class that turns a batch into a work list."""
        return LlmirMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """The block size the kernels were compiled for."""
        config = get_current_vllm_config_or_none()
        if config is None:
            return [MultipleOf(32)]  # asked outside of any configuration: what vLLM's own CPU backend says
        return [plan_of(config).block_size]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Head sizes there are kernel generators for."""
        return list(HEAD_SIZES)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Pages of one KV head are contiguous: [blocks, KV heads, page]."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows are compiled into the kernels."""
        return True


def plan_of(vllm_config: VllmConfig) -> Plan:
    """The plan that travels with ``vllm_config``; parsed once a configuration."""
    additional = vllm_config.additional_config
    plan = additional.get(PLAN_KEY) if isinstance(additional, dict) else None
    if plan is None:
        raise UnsupportedLayerError("all", "vLLM's configuration carries no llmir plan; is the llmir plugin disabled?")
    key = id(plan)
    if key not in _parsed_plans:
        _parsed_plans[key] = (plan, Plan.from_json(plan))
    return _parsed_plans[key][1]


#: Parsed plans by the identity of their JSON, which is kept alive beside them.
_parsed_plans: dict[int, tuple[Any, Plan]] = {}


class LlmirMetadataBuilder(AttentionMetadataBuilder["LlmirMetadata"]):
    """Turns each batch into the work lists of the kernels that one group of layers uses."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        load = functools.partial(AttentionRunner.load, object_cache=object_cache())
        self._planned = PlannedLayers(plan_of(vllm_config), load)
        for name in layer_names:
            layer = layers[name]
            assert isinstance(layer, Attention) and isinstance(layer.impl, LlmirAttentionImpl)
            layer.impl.bind(name, kv_cache_spec, self._planned)
        for symbol, count in self._planned.kernels.items():
            logger.info("llmir: %s serves %d layers", symbol, count)
        self._sharing = SharingReport(self._planned.sharing, vllm_config.parallel_config.rank == 0, logger)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LlmirMetadata:
        """The work lists of one batch, for every layer of the group."""
        batch = common_attn_metadata
        if batch.causal is not True:
            raise UnsupportedLayerError(self.layer_names[0], "a step asks for attention that is not causal")
        requests = batch.num_reqs
        block_table = batch.block_table_tensor
        if block_table.dtype != torch.int32 or block_table.stride(1) != 1:
            raise UnsupportedLayerError(self.layer_names[0], "vLLM's block table is not one of int32 rows")
        query_start = batch.query_start_loc[: requests + 1].numpy()
        seq_lens = batch.seq_lens[:requests].numpy()
        self._planned.begin_step(query_start, seq_lens, block_table[:requests].numpy(), torch.get_num_threads())
        self._sharing.update()
        return LlmirMetadata(batch.num_actual_tokens, batch.slot_mapping)


@dataclass
class LlmirMetadata(AttentionMetadata):
    """What ``forward`` needs beside the work list, which the runners hold."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    """int64 [tokens]: where each new token goes in the cache."""


class LlmirAttentionImpl(AttentionImpl["LlmirMetadata"]):
    """One attention layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ):
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.sliding_window = sliding_window
        self.logits_soft_cap = logits_soft_cap
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        refused = {
            "it has ALiBi slopes": alibi_slopes is not None,
            "it has attention sinks": extra.pop("sinks", None) is not None,
            f"its attention type is {attn_type}, and llmir serves decoders": attn_type != AttentionType.DECODER,
            f"its KV cache is {kv_cache_dtype}": kv_cache_dtype.startswith(("fp8", "int8", "nvfp4", "turboquant")),
            f"it needs {sorted(extra)}": bool(extra),
        }
        self._refusal = next((reason for reason, applies in refused.items() if applies), None)
        self._runner: AttentionRunner | None = None
        self._cache = torch.empty(0)

    def bind(self, layer: str, kv_cache_spec: AttentionSpec, planned: PlannedLayers[AttentionRunner]) -> None:
        """Take the layer's kernel from the plan.

        Called while vLLM sets up its caches, so that what cannot be served is refused before serving.
        """
        if self._refusal:
            raise UnsupportedLayerError(layer, self._refusal)
        dtype = dtype_name(kv_cache_spec.dtype)
        facts = LayerFacts(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            element_type=ELEMENT_TYPES.get(dtype, dtype),
            block_size=kv_cache_spec.block_size,
            scale=self.scale,
            window=self.sliding_window or 0,
            soft_cap=self.logits_soft_cap or 0.0,
        )
        self._runner = planned.bind(layer, facts)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LlmirMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends ``key`` and ``value`` to the cache and attends, into ``output``.

        ``query`` and ``output`` [tokens, heads, head_size], ``key`` and ``value`` [tokens, KV heads, head_size],
        ``kv_cache`` [blocks, KV heads, block_size, 2 * head_size], in the cache's dtype. Without metadata (vLLM's
        warm-up) nothing is done.
        """
        if attn_metadata is None:
            return output
        if kv_cache is not self._cache:
            self._check_cache(kv_cache)
        runner = self._runner
        assert runner is not None
        appends = self.kv_sharing_target_layer_name is None
        runner.attend(
            heads(query, self.head_size),
            heads(key, self.head_size) if appends else (0, 0),
            heads(value, self.head_size) if appends else (0, 0),
            heads(output, self.head_size),
            kv_cache.data_ptr(),
            attn_metadata.slot_mapping.data_ptr(),
            attn_metadata.num_actual_tokens if appends else 0,
        )
        return output

    def _check_cache(self, kv_cache: torch.Tensor) -> None:
        """The kernels address pages by their number alone: the cache must be one contiguous array of them."""
        assert self._runner is not None
        s = self._runner.spec.signature
        expected = (s.num_kv_heads, s.block_size, 2 * s.head_size)
        if tuple(kv_cache.shape[1:]) != expected or not kv_cache.is_contiguous():
            found = f"{tuple(kv_cache.shape)} with strides {kv_cache.stride()}"
            raise UnsupportedLayerError("all", f"vLLM's KV cache is {found}, not an array of pages of {expected}")
        self._cache = kv_cache
