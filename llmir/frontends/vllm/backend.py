"""What vLLM calls on a CPU: its attention backend interface, answered with llmir's compiled kernels.

vLLM builds one metadata object a step and calls ``forward`` once a layer; here the metadata is a work list and
``forward`` is one kernel call, which also appends the new keys and values to the cache.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from llmir.compiler import object_cache
from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.sharing_report import SharingReport
from llmir.frontends.common.tensors import address_of
from llmir.frontends.vllm.description import (
    PlannedBackend,
    PlannedImpl,
    bind_layers,
    check_batch,
    plan_of,
)
from llmir.frontends.vllm.support import BLOCK_SIZES
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.layers import PlannedLayers, heads
from llmir.runtime.step import Step

logger = logging.getLogger("vllm.llmir")


class LlmirAttentionBackend(PlannedBackend):
    """vLLM's description of llmir on a CPU: what it can be asked for, and the classes that do it."""

    block_size_step: int = BLOCK_SIZES["cpu"][0]
    on_gpu: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_impl_cls() -> type[LlmirAttentionImpl]:
        """The class that attends."""
        return LlmirAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LlmirMetadataBuilder]:
        """The class that turns a batch into a work list."""
        return LlmirMetadataBuilder


class LlmirMetadataBuilder(AttentionMetadataBuilder["LlmirMetadata"]):
    """Turns each batch into the work lists of the kernels that one group of layers uses."""

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        load = functools.partial(CpuAttentionRunner.load, object_cache=object_cache())
        self._planned = PlannedLayers(plan_of(vllm_config), load)
        bind_layers(self._planned, self, logger)
        self._sharing = SharingReport(self._planned.sharing, vllm_config.parallel_config.rank == 0, logger)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LlmirMetadata:
        """The work lists of one batch, for every layer of the group."""
        batch = common_attn_metadata
        check_batch(self.layer_names[0], batch)
        requests, block_table = batch.num_reqs, batch.block_table_tensor
        query_start = batch.query_start_loc[: requests + 1].numpy()
        seq_lens = batch.seq_lens[:requests].numpy()
        step = Step(query_start, seq_lens, block_table[:requests].numpy())
        self._planned.begin_step(step, torch.get_num_threads())
        self._sharing.update()
        return LlmirMetadata(batch.num_actual_tokens, batch.slot_mapping)


@dataclass
class LlmirMetadata(AttentionMetadata):
    """What ``forward`` needs beside the work list, which the runners hold."""

    num_actual_tokens: int
    slot_mapping: torch.Tensor
    """int64 [tokens]: where each new token goes in the cache."""


class LlmirAttentionImpl(PlannedImpl):
    """One attention layer on a CPU."""

    _runner: CpuAttentionRunner | None = None
    _cache: torch.Tensor | None = None

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
        warm-up) nothing is done. Raises UnsupportedLayerError for tensors that the kernel would read as what they are
        not, and where the output is to be quantized.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedLayerError(self._layer, "its output is to be quantized")
        if attn_metadata is None:
            return output
        runner = self._runner
        assert runner is not None
        if kv_cache is not self._cache:
            self.take_cache(kv_cache)
            self._cache = kv_cache
        tokens, slots = attn_metadata.num_actual_tokens, attn_metadata.slot_mapping
        appends = self.kv_sharing_target_layer_name is None
        self._tensors.check(query, output, tokens)
        sinks = self._tensors.sinks(self.sinks, torch.float32)
        if appends:
            self._tensors.check_new(key, value, slots, tokens)
        runner.attend(
            heads(query, self.head_size),
            heads(key, self.head_size) if appends else (0, 0),
            heads(value, self.head_size) if appends else (0, 0),
            heads(output, self.head_size),
            kv_cache.data_ptr(),
            slots.data_ptr(),
            tokens if appends else 0,
            sinks=address_of(sinks),
            slopes=address_of(self.slopes),
        )
        return output
