"""What SGLang calls on a GPU, CUDA's or ROCm's: its attention backend interface, answered with llmir's Triton kernels.

Lengths are those that SGLang keeps on the host, so a step's work list is made without waiting for the device, where
the block table is (``host_table.py`` follows it from afar, for prefix sharing). A step that SGLang replays as a CUDA
graph is prepared before the replay, in the same buffers: the captured launches find there what the step has.

SGLang's graphs: those of decode steps (``full`` and ``breakable``), and the breakable ones of prefills, which leave
attention out and call it as ever. Requests that pad a batch to a captured size have one token, in SGLang's spare slot.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_schedule, max_prefill_buffer_tokens

from llmir.errors import LlmirError, UnsupportedLayerError
from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.frontends.sglang import hooks, support
from llmir.frontends.sglang.base_backend import PlannedBackend, logger
from llmir.frontends.sglang.host_table import HostTable
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.step import Step

#: Tokens of a request that pads a batch: it attends to SGLang's spare slot, and what it gives is defined.
PADDED_LENGTH = 1


class LlmirGpuBackend(PlannedBackend[GpuAttentionRunner]):
    """All attention layers of one model runner on a GPU."""

    def __init__(self, runner: Any):
        hooks.keep_models_from_the_cache()
        hooks.name_replayed_requests()
        self._scales: dict[int, dict[str, torch.Tensor]] = {}
        self._device = runner.req_to_token_pool.req_to_token.device
        self._limits = step_limits(runner)
        super().__init__(runner, functools.partial(GpuAttentionRunner.load, limits=self._limits, device=self._device))
        self._host_table = HostTable(self._page_size) if self._shares_prefixes else None
        self._columns = -(-self._req_to_token.shape[1] // self._page_size)
        self._graph_table = torch.zeros((0, self._columns), dtype=torch.int32, device=self._device)
        # Of the step begun last: its block table [requests, columns], and how many new tokens it has.
        self._block_table, self._tokens = self._graph_table, 0
        logger.info(
            "llmir: steps of up to %d requests and %d new tokens%s",
            self._limits.requests,
            self._limits.tokens,
            "; prefixes are shared between decoding requests, once their block table has come in the background"
            if self._shares_prefixes
            else "",
        )

    def _bind(self, path: str, layer: RadixAttention, dtype: Any) -> None:
        super()._bind(path, layer, dtype)
        if self.token_to_kv_pool.is_fp8:
            self._scales[layer.layer_id] = {
                "key_scale": _scale(layer.k_scale, self._device),
                "value_scale": _scale(layer.v_scale, self._device),
            }

    # ---- a step without a graph

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the work lists of a batch, for all its layers."""
        batch = forward_batch
        if not self._may_prepare(batch):
            return
        lengths = _lengths(batch)
        decodes = batch.forward_mode.is_decode()
        new_tokens = np.ones_like(lengths) if decodes else np.asarray(batch.extend_seq_lens_cpu, np.int32)
        columns = -(-int(lengths.max()) // self._page_size)
        table = torch.empty((len(lengths), columns), dtype=torch.int32, device=self._device)
        if not decodes and self._host_table is not None:
            self._host_table.forget(batch.rids)
        self._begin_step(batch, lengths, new_tokens, table, batch.rids or () if decodes else ())

    # ---- a step of a CUDA graph

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Allocate what the graphs of up to ``max_bs`` requests have addresses of."""
        if max_bs > self._limits.requests or max_num_tokens > self._limits.tokens:
            raise LlmirError(
                f"SGLang captures graphs of {max_bs} requests with {max_num_tokens} new tokens, and llmir has buffers "
                f"for {self._limits.requests} and {self._limits.tokens}: give a smaller --cuda-graph-max-bs-decode"
            )
        if len(self._graph_table) < max_bs:
            self._graph_table = torch.zeros((max_bs, self._columns), dtype=torch.int32, device=self._device)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Make the work lists of a batch that a graph is captured, or about to be replayed, for.

        The batch is padded to a captured size; ``in_capture`` it is nothing but padding.
        """
        batch = forward_batch
        if self._is_captured():
            # SGLang's graph of the preparation itself: what is made on the host would be that of its capture for ever.
            raise UnsupportedFeatureError(
                "llmir prepares a step on the host, which no graph repeats: leave out SGLANG_ENABLE_METADATA_GLUE_GRAPH"
            )
        if not self._may_prepare(batch):
            return
        if not batch.forward_mode.is_decode():
            raise UnsupportedFeatureError(
                f"llmir has no graphs of {batch.forward_mode.name} steps: give --cuda-graph-backend-prefill breakable"
            )
        lengths = _lengths(batch)
        rids = () if in_capture else getattr(batch, "rids", None) or ()
        if not (rids or in_capture) and self._shares_prefixes:
            self._sharing.blind("SGLang does not say whose requests a CUDA graph is replayed for")
        self._begin_step(batch, lengths, np.ones_like(lengths), self._graph_table[: len(lengths)], rids)

    def _is_captured(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Tokens of a request that pads a batch."""
        return PADDED_LENGTH

    # ---- both

    def _begin_step(
        self, batch: Any, lengths: np.ndarray, new_tokens: np.ndarray, table: torch.Tensor, rids: Sequence[str]
    ) -> None:
        """Prepare all layers; ``lengths`` and ``new_tokens`` int32 [requests], ``table`` [requests, columns].

        ``rids``: the requests' ids, without the padding, where all decode and SGLang says them; else none.
        """
        query_start = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(new_tokens, out=query_start[1:])
        known = self._host_table.of(rids, lengths) if rids and self._host_table is not None else None
        self._planned.begin_step(Step(query_start, lengths, known), threads=0)
        self._sharing.update()
        # A page's slots follow one another, so its first one tells its number. All of this stays on the device.
        first_slots = self._req_to_token[:, : int(lengths.max()) : self._page_size]
        columns = first_slots.shape[1]
        torch.floor_divide(first_slots.index_select(0, batch.req_pool_indices), self._page_size, out=table[:, :columns])
        if rids and self._host_table is not None:
            self._host_table.follow(rids, lengths, table[: len(rids), :columns])
        self._block_table, self._tokens = table, int(query_start[-1])

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **call: Any,
    ) -> torch.Tensor:
        """Append ``k`` and ``v`` [tokens, KV heads, head_dim] to the cache and attend: [tokens, heads * head_dim].

        ``q`` [tokens, heads * head_dim], ``sinks`` [heads]. With ``save_kv_cache`` False the cache has them already.
        Element types as on a CPU.
        """
        if k is None or call:  # checked once for all layers when the model was imported; so as a rule there is nothing
            support.check_call(f"layer {layer.layer_id}", k, call)
        runner, tokens, tensors = self._runners[layer.layer_id], q.shape[0], self._tensors[layer.layer_id]
        if tokens != self._tokens:
            raise UnsupportedLayerError(
                f"layer {layer.layer_id}", f"it is called for {tokens} tokens, and {self._tokens} were announced"
            )
        query, key, value = tensors.converted(q), tensors.converted(k), tensors.converted(v)
        output = _output(query, forward_batch)
        tensors.check(query, output, tokens)
        if save_kv_cache:
            tensors.check_new(key, value, forward_batch.out_cache_loc, tokens)
        pool = self.token_to_kv_pool
        runner.attend(
            query,
            key,
            value,
            output,
            pool.pages[layer.layer_id - pool.start_layer].view(pool.dtype),
            self._block_table,
            forward_batch.out_cache_loc[:tokens],
            tokens if save_kv_cache else 0,
            sinks=tensors.sinks(sinks, query.dtype),
            **self._scales.get(layer.layer_id, {}),
        )
        return output.view(tokens, -1).to(q.dtype)

    # A decode is a batch of one new token each; the work list knows.
    forward_decode = forward_extend


def step_limits(runner: Any) -> StepLimits:
    """The most requests of a step, padding included, and the most new tokens, by SGLang's own limits on its batches.

    Without chunks, a prompt that is longer than what SGLang prefills at once comes alone.
    """
    schedule, requests = get_schedule(), len(runner.req_to_token_pool.req_to_token)
    tokens = max(max_prefill_buffer_tokens(), schedule.max_prefill_tokens or 0)
    if (schedule.chunked_prefill_size or -1) < 0:
        tokens = max(tokens, runner.model_config.context_len)
    return StepLimits(requests=requests, tokens=tokens + requests)  # a prefill may have decodes beside it


def _lengths(batch: Any) -> np.ndarray:
    """Tokens of each request, from the host: int32 [requests]."""
    lengths: np.ndarray = batch.seq_lens_cpu.numpy().astype(np.int32)
    return lengths


def _output(query: torch.Tensor, batch: Any) -> torch.Tensor:
    """Where a call's result goes, shaped as ``query``: into what SGLang has allocated for it, if it has."""
    given, (tokens, heads, size) = getattr(batch, "_attn_output", None), query.shape
    if given is not None and given.shape == (tokens, heads * size) and given.dtype == query.dtype:
        return given.view(tokens, heads, size)
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)


def _scale(given: Any, device: torch.device) -> torch.Tensor:
    """A scale as a kernel takes it, float32 [1]; SGLang has a tensor that it may write again, a number, or none (1)."""
    if isinstance(given, torch.Tensor):
        return given.detach().view(1).float()
    return torch.full((1,), 1.0 if given is None else float(given), dtype=torch.float32, device=device)
