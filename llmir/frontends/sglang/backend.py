"""What SGLang calls on a CPU: its attention backend interface, answered with llmir's compiled kernels.

SGLang announces each batch once and calls ``forward_decode`` or ``forward_extend`` once a layer; here a batch is a work
list and a layer is one kernel call, which also appends the new keys and values.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from llmir.compiler import object_cache
from llmir.frontends.common.tensors import address_of
from llmir.frontends.sglang import support
from llmir.frontends.sglang.base_backend import PlannedBackend
from llmir.frontends.sglang.page_table import PageTable
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.layers import heads
from llmir.runtime.step import Step


class LlmirAttentionBackend(PlannedBackend[CpuAttentionRunner]):
    """All attention layers of one model runner on a CPU."""

    #: New tokens of the batch announced last.
    _tokens = 0

    def __init__(self, runner: Any):
        super().__init__(runner, functools.partial(CpuAttentionRunner.load, object_cache=object_cache()))
        self._table = PageTable(self.req_to_token_pool, self._page_size)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Make the work lists of a batch, for all its layers."""
        batch = forward_batch
        if not self._may_prepare(batch):
            return
        lengths = batch.seq_lens.numpy().astype(np.int32)
        query_start = np.zeros(len(lengths) + 1, np.int32)
        new_tokens = 1 if batch.forward_mode.is_decode() else batch.extend_seq_lens.numpy()
        query_start[1:] = np.cumsum(np.broadcast_to(new_tokens, lengths.shape))
        rows = batch.req_pool_indices.numpy()
        unchanged = self._table.update(rows, lengths)
        self._tokens = int(query_start[-1])
        step = Step(query_start, lengths, self._table.pages, rows, unchanged)
        self._planned.begin_step(step, torch.get_num_threads())
        self._sharing.update()

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
        What a model computed in another element type is converted to its own, as SGLang's kernels do, and the result to
        that of ``q``.
        """
        if k is None or call:  # checked once for all layers when the model was imported; so as a rule there is nothing
            support.check_call(f"layer {layer.layer_id}", k, call)
        runner, size, tensors = self._runners[layer.layer_id], layer.qk_head_dim, self._tensors[layer.layer_id]
        sinks = tensors.sinks(sinks, torch.float32)
        query, key, value = tensors.converted(q), tensors.converted(k), tensors.converted(v)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        tensors.check(query, output, self._tokens)
        slots = forward_batch.out_cache_loc
        if save_kv_cache:
            tensors.check_new(key, value, slots, len(slots))
        pool = self.token_to_kv_pool
        runner.attend(
            heads(query, size),
            heads(key, size),
            heads(value, size),
            heads(output, size),
            pool.pages[layer.layer_id - pool.start_layer].data_ptr(),
            slots.data_ptr(),
            len(slots) if save_kv_cache else 0,
            sinks=address_of(sinks),
        )
        return output.view(q.shape[0], -1).to(q.dtype)

    # A decode is a batch of one new token each; the work list knows.
    forward_decode = forward_extend

    def support_triton(self) -> bool:
        """Whether SGLang may prepare batches with Triton kernels: there are none on a CPU."""
        return False
