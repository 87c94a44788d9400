"""What vLLM calls on a GPU: its attention backend interface, answered with llmir's Triton kernels.

As on a CPU (``backend.py``), the metadata of a step is a work list, which is made on the host. Nothing here waits for
the device: query starts and lengths are those that vLLM keeps on the host, the work list goes to a buffer of its own
while earlier work still runs, and the block table stays where it is. In a captured CUDA graph the same buffers are read
again, so one graph serves every step that fits its number of tokens, whatever the step is made of.
"""

from __future__ import annotations

import functools
import logging
import weakref
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.sharing_report import SharingReport
from llmir.frontends.vllm import block_tables
from llmir.frontends.vllm.description import (
    PlannedBackend,
    PlannedImpl,
    bind_layers,
    check_batch,
    plan_of,
)
from llmir.frontends.vllm.support import BLOCK_SIZES, QUANTIZED_CACHE_DTYPES
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.layers import PlannedLayers
from llmir.runtime.step import Step

logger = logging.getLogger("vllm.llmir")

#: First compute capabilities with matrix products of bfloat16 (AMD's gfx942 counts as 9.4), and NVIDIA's first of
#: those that llmir has kernels for with conversions from 8-bit floats.
LEAST_MAJOR = 8
LEAST_QUANTIZING_MAJOR = 9


class LlmirGpuAttentionBackend(PlannedBackend):
    """vLLM's description of llmir on a GPU: what it can be asked for, and the classes that do it."""

    block_size_step: int = BLOCK_SIZES["gpu"][0]
    on_gpu: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16", *QUANTIZED_CACHE_DTYPES]

    @staticmethod
    def get_impl_cls() -> type[LlmirGpuAttentionImpl]:
        """The class that attends."""
        return LlmirGpuAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LlmirGpuMetadataBuilder]:
        """The class that turns a batch into a work list."""
        return LlmirGpuMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        """Sinks are compiled into the kernels."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Whether a GPU has what all kernels need; which architectures there are, the target says."""
        return capability.major >= LEAST_MAJOR

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """What does not go together, though each for itself does."""
        quantizes = current_platform.is_cuda() and device_capability.major >= LEAST_QUANTIZING_MAJOR
        if kv_cache_dtype in QUANTIZED_CACHE_DTYPES and not quantizes:
            return (
                f"a KV cache of {kv_cache_dtype} needs an NVIDIA GPU of compute capability {LEAST_QUANTIZING_MAJOR}.0"
            )
        return None

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """Caches are not transferred: nobody else knows the layout of a page."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """The work list is made of the query lengths that the host has."""
        return False


@dataclass
class LlmirGpuMetadata(AttentionMetadata):
    """What ``forward`` needs beside the work list, which the runners hold."""

    num_actual_tokens: int
    """Tokens whose keys and values are appended, where ``slot_mapping`` gives them a place."""
    slot_mapping: torch.Tensor
    """int64 [tokens], on the device: where each new token goes in the cache; negative: nowhere."""
    block_table: torch.Tensor
    """int32 [requests, columns], on the device."""


class LlmirGpuMetadataBuilder(AttentionMetadataBuilder["LlmirGpuMetadata"]):
    """Turns each batch into the work lists of the kernels that one group of layers uses."""

    # A captured graph holds nothing of the batch it was captured with but its number of tokens and the addresses of
    # vLLM's buffers and llmir's; how many items there are, and which, is read from the work list at each replay.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        limits = StepLimits(requests=scheduler.max_num_seqs, tokens=scheduler.max_num_batched_tokens)
        plan = plan_of(vllm_config)
        self._planned = PlannedLayers(plan, functools.partial(GpuAttentionRunner.load, limits=limits, device=device))
        bind_layers(self._planned, self, logger)
        self._shares = any(k.policy.sharing is not None for k in plan.kernels if k.symbol in self._planned.kernels)
        self._block_size = kv_cache_spec.block_size
        self._sharing = SharingReport(self._planned.sharing, vllm_config.parallel_config.rank == 0, logger)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LlmirGpuMetadata:
        """The work lists of one batch, for every layer of the group."""
        return self._begin(common_attn_metadata, self._shares)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> LlmirGpuMetadata:
        """The same for a batch that vLLM invented, of which only the buffers go into the graph."""
        return self._begin(common_attn_metadata, shares=False)

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """Never: shared prefixes are the plan's concern. Asked by vLLM before 0.32."""
        return False

    def _begin(self, batch: CommonAttentionMetadata, shares: bool) -> LlmirGpuMetadata:
        check_batch(self.layer_names[0], batch)
        block_table = batch.block_table_tensor
        if batch.seq_lens_cpu_upper_bound is None:
            raise UnsupportedLayerError(self.layer_names[0], "vLLM keeps no sequence lengths on the host")
        # A batch that is padded for a captured graph ends with requests of no tokens, and with tokens that have no
        # slot: the first get no items, and the second are not appended.
        query_start = batch.query_start_loc_cpu[: batch.num_reqs + 1].numpy()
        requests = int(np.count_nonzero(np.diff(query_start)))
        if np.any(np.diff(query_start[: requests + 1]) == 0):
            raise UnsupportedLayerError(self.layer_names[0], "a step has requests without tokens before others")
        # Exact, but for asynchronous speculative decoding, which support.py refuses.
        seq_lens = batch.seq_lens_cpu_upper_bound[:requests].numpy()
        table = self._shared_table(block_table, seq_lens) if shares and requests > 1 else None
        self._planned.begin_step(Step(query_start[: requests + 1], seq_lens, table), threads=0)
        self._sharing.update()
        return LlmirGpuMetadata(batch.num_actual_tokens, batch.slot_mapping, block_table)

    def _shared_table(self, block_table: torch.Tensor, seq_lens: np.ndarray) -> np.ndarray | None:
        """A step's block table on the host, if anybody may share a prefix there."""
        requests = len(seq_lens)
        first = block_tables.on_host(block_table, requests, 1, self._block_size)
        if first is None:
            if not block_tables.is_invented(block_table):
                self._sharing.blind("vLLM keeps no block table of this step on the host")
            return None
        # Gathering all columns takes longer than all else here, and a common prefix has a common first block.
        if len(np.unique(first[:, 0])) == requests:
            return None
        return block_tables.on_host(block_table, requests, int(seq_lens.max()), self._block_size)


class LlmirGpuAttentionImpl(PlannedImpl):
    """One attention layer on a GPU."""

    quantized_dtypes = QUANTIZED_CACHE_DTYPES
    _runner: GpuAttentionRunner | None = None
    #: The cache that was checked. vLLM makes a small one to measure memory with, which is not to be kept alive.
    _cache: weakref.ref[torch.Tensor] | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        block_tables.watch()  # vLLM builds its layers before its caches

    def bind(
        self, layer: str, kv_cache_spec: AttentionSpec, model_dtype: Any, planned: PlannedLayers[GpuAttentionRunner]
    ) -> None:
        """As for any device, after what only the kernels of a GPU do not do."""
        if self.kv_sharing_target_layer_name is not None:
            raise UnsupportedLayerError(layer, f"it shares the KV cache of layer {self.kv_sharing_target_layer_name!r}")
        if self.sinks is not None and self.sinks.dtype != model_dtype:
            raise UnsupportedLayerError(layer, f"its sinks are of {self.sinks.dtype}, and the model of {model_dtype}")
        super().bind(layer, kv_cache_spec, model_dtype, planned)

    def _check_scales(self, layer: Any) -> None:
        """Raise UnsupportedLayerError unless the scales of a quantized cache are what its kernel reads."""
        for scale in (layer._k_scale, layer._v_scale):
            if scale.dtype is not torch.float32 or scale.numel() != 1:
                found = f"{list(scale.shape)} in {scale.dtype}"
                raise UnsupportedLayerError(self._layer, f"a scale of its KV cache is {found}, not one float32")

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: LlmirGpuMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends ``key`` and ``value`` to the cache and attends, into ``output``.

        ``query`` and ``output`` [tokens, heads, head_size], ``key`` and ``value`` [tokens, KV heads, head_size],
        ``kv_cache`` [blocks, KV heads, block_size, 2 * head_size], in the cache's dtype (uint8 for fp8). Without
        metadata (vLLM's memory profiling) the output is zeros. Raises UnsupportedLayerError where the output is to be
        quantized, which :meth:`fused_output_quant_supported` does not offer.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedLayerError(getattr(layer, "layer_name", "all"), "its output is to be quantized")
        if attn_metadata is None:
            return output.fill_(0)
        runner = self._runner
        assert runner is not None
        if self._cache is None or self._cache() is not kv_cache:
            self.take_cache(kv_cache)
            if runner.spec.attention.cache.quantized:
                self._check_scales(layer)
            self._cache = weakref.ref(kv_cache)
        tokens, slots = attn_metadata.num_actual_tokens, attn_metadata.slot_mapping
        self._tensors.check(query, output, tokens)
        self._tensors.check_new(key, value, slots, tokens)
        runner.attend(
            query,
            key,
            value,
            output,
            kv_cache.view(torch.float8_e4m3fn) if runner.spec.attention.cache.quantized else kv_cache,
            attn_metadata.block_table,
            slots,
            tokens,
            key_scale=layer._k_scale,
            value_scale=layer._v_scale,
            sinks=self.sinks,
        )
        return output
