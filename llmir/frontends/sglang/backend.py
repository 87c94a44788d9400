"""What SGLang calls: its attention backend interface, answered with llmir's compiled kernels.

The plan comes with SGLang's server arguments, put there while they were resolved, so this works the same in every
process SGLang starts. SGLang announces each batch once and calls ``forward_decode`` or ``forward_extend`` once a
layer; here a batch is a work list and a layer is one kernel call, which also appends the new keys and values.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.runtime_context import get_parallel

from llmir.compiler import object_cache
from llmir.errors import UnsupportedLayerError
from llmir.frontends.common.sharing_report import SharingReport
from llmir.frontends.sglang import support
from llmir.frontends.sglang.planning import plan_of
from llmir.frontends.sglang.pool import LlmirKVPool
from llmir.runtime.attention import AttentionRunner
from llmir.runtime.layers import PlannedLayers, heads

logger = logging.getLogger("sglang.llmir")


class LlmirAttentionBackend(AttentionBackend):
    """All attention layers of one model runner."""

    def __init__(self, runner: Any):
        super().__init__()
        self._pool = runner.token_to_kv_pool
        if not isinstance(self._pool, LlmirKVPool):
            raise UnsupportedLayerError("all", f"SGLang made a {type(self._pool).__name__}, not llmir's KV pool")
        self._req_to_token = runner.req_to_token_pool.req_to_token
        self._page_size = self._pool.page_size
        load = functools.partial(AttentionRunner.load, object_cache=object_cache())
        self._planned = PlannedLayers(plan_of(runner.server_args), load)
        self._runners: dict[int, AttentionRunner] = {}
        for path, layer in runner.model.named_modules():
            if isinstance(layer, RadixAttention):
                self._bind(path, layer)
        for symbol, count in self._planned.kernels.items():
            logger.info("llmir: %s serves %d layers", symbol, count)
        ranks = get_parallel()
        self._sharing = SharingReport(self._planned.sharing, ranks.tp_rank == ranks.pp_rank == 0, logger)

    def _bind(self, path: str, layer: RadixAttention) -> None:
        support.check_attention(path, layer)
        if layer.layer_id in self._runners:
            raise UnsupportedLayerError(path, f"another layer has its number ({layer.layer_id})")
        facts = support.layer_facts(layer, self._pool.dtype, self._page_size)
        self._runners[layer.layer_id] = self._planned.bind(path, facts)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the work lists of a batch, for all its layers."""
        batch = forward_batch
        if batch.forward_mode.is_idle():
            return
        if batch.spec_info is not None:
            raise UnsupportedLayerError("all", "a batch comes from speculative decoding")
        lengths = batch.seq_lens.numpy().astype(np.int32)
        query_start = np.zeros(len(lengths) + 1, np.int32)
        new_tokens = 1 if batch.forward_mode.is_decode() else batch.extend_seq_lens.numpy()
        query_start[1:] = np.cumsum(np.broadcast_to(new_tokens, lengths.shape))
        # A page's slots follow one another, so its first one tells its number.
        first_slots = self._req_to_token.numpy()[batch.req_pool_indices.numpy(), : lengths.max() : self._page_size]
        block_table = np.ascontiguousarray(first_slots // self._page_size, np.int32)
        self._planned.begin_step(query_start, lengths, block_table, torch.get_num_threads())
        self._sharing.update()

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **call: Any,
    ) -> torch.Tensor:
        """Append ``k`` and ``v`` [tokens, KV heads, head_dim] to the cache and attend: [tokens, heads * head_dim].

        ``q`` [tokens, heads * head_dim]. With ``save_kv_cache`` False the cache has them already.
        """
        if k is None or call:  # checked once for all layers when the model was imported; so as a rule there is nothing
            support.check_call(f"layer {layer.layer_id}", k, call)
        size = layer.qk_head_dim
        output = q.new_empty((q.shape[0], layer.tp_q_head_num * size))
        query = q.view(-1, layer.tp_q_head_num, size)
        slots = forward_batch.out_cache_loc
        self._runners[layer.layer_id].attend(
            heads(query, size),
            heads(k.view(-1, layer.tp_k_head_num, size), size),
            heads(v.view(-1, layer.tp_k_head_num, size), size),
            heads(output.view(-1, layer.tp_q_head_num, size), size),
            self._pool.pages[layer.layer_id - self._pool.start_layer].data_ptr(),
            slots.data_ptr(),
            len(slots) if save_kv_cache else 0,
        )
        return output

    # A decode is a batch of one new token each; the work list knows.
    forward_decode = forward_extend

    def support_triton(self) -> bool:
        """Whether SGLang may prepare batches with Triton kernels: there are none on a CPU."""
        return False
