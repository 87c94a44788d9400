"""Steps of a few tokens on a CPU, and float64 stand-ins for peers' functions that need a GPU."""

from __future__ import annotations

import types

import torch
from on_gpu.batches import TINY, Batch
from on_gpu.step import Arena, Step, exact_rows

GRAIN = 16
DECODE = Batch("decode", TINY, (1, 1, 1), (5, 17, 40))
MIXED = Batch("mixed", TINY, (9, 1, 3), (30, 16, 3))
ONE = Batch("one", TINY, (1,) * 4, (3, 17, 1, 16), ((1, 32),))
TREE = Batch("tree", TINY, (1,) * 4, (3, 17, 1, 16), ((1, 32), (2, 16)))


def step_of(batch: Batch, layers: int = 2, grain: int = GRAIN) -> Step:
    """A step with random f32 inputs."""
    generator = torch.Generator().manual_seed(7)
    return Step(batch, Arena(1 << 20, "f32", torch.device("cpu"), generator), layers, grain, generator)


def paged_attention(query, keys, values, query_start, lengths, table, causal):
    """Output and natural log-sum-exp [heads, tokens] of requests whose last tokens are the queries.

    ``keys``, ``values`` [pages, page_size, KV heads, head_size].
    """
    page, output, lse = keys.shape[1], torch.full_like(query, torch.nan), query.new_empty(query.shape[:2]).T
    for request, length in enumerate(lengths.tolist()):
        begin, end = int(query_start[request]), int(query_start[request + 1])
        tokens = torch.arange(length)
        where = (table[request, tokens // page].long(), tokens % page)
        k, v = keys[where], values[where]
        positions = torch.arange(length - (end - begin), length) if causal else torch.full((end - begin,), length)
        output[begin:end] = exact_rows(query[begin:end], positions, k, v).to(query.dtype)
        # Of queries that see every key: those whose parts are merged here do.
        scores = torch.einsum("qhd,khd->hqk", query[begin:end], k.repeat_interleave(query.shape[1] // k.shape[1], 1))
        lse[:, begin:end] = torch.logsumexp(scores * query.shape[2] ** -0.5, -1)
    return output, lse


def merge(output, prefix, prefix_lse, rest, rest_lse):
    """Two attentions over different keys put together, as vLLM's merge_attn_states."""
    weight = torch.softmax(torch.stack([prefix_lse, rest_lse]), 0).transpose(1, 2)[..., None]
    output.copy_(prefix * weight[0] + rest * weight[1])


def flash_attention() -> types.SimpleNamespace:
    """vLLM's flash_attn_interface, in float64."""

    def flash_attn_varlen_func(
        *,
        q,
        k,
        v,
        max_seqlen_q,
        cu_seqlens_q,
        max_seqlen_k,
        seqused_k,
        softmax_scale,
        causal,
        block_table,
        scheduler_metadata,
        fa_version,
        out=None,
        return_softmax_lse=False,
    ):
        assert scheduler_metadata == "schedule" and fa_version == 3
        assert max_seqlen_q >= int(cu_seqlens_q.diff().max()) and max_seqlen_k >= int(seqused_k.max())
        output, lse = paged_attention(q, k, v, cu_seqlens_q, seqused_k, block_table, causal)
        if out is not None:
            out.copy_(output)
        return (output, lse) if return_softmax_lse else output

    return types.SimpleNamespace(
        flash_attn_varlen_func=flash_attn_varlen_func, get_scheduler_metadata=lambda **_: "schedule"
    )


class _Wrapper:
    """A FlashInfer wrapper over one list of pages."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "NHD"

    def _planned(self, query_start, indptr, indices, last, sizes, causal, q_data_type, sm_scale):
        page = sizes[-1]
        counts = indptr.diff()
        self.table = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for request, count in enumerate(counts.tolist()):
            self.table[request, :count] = indices[indptr[request] : indptr[request + 1]]
        self.lengths = (counts - 1) * page + last
        self.query_start, self.causal = query_start, causal

    def attend(self, query, cache):
        return paged_attention(query, *cache, self.query_start, self.lengths, self.table, self.causal)

    def run(self, query, cache, out):
        return out.copy_(self.attend(query, cache)[0])


class Decode(_Wrapper):
    """BatchDecodeWithPagedKVCacheWrapper."""

    def plan(self, indptr, indices, last, *sizes, q_data_type, sm_scale):
        self._planned(torch.arange(len(last) + 1), indptr, indices, last, sizes, True, q_data_type, sm_scale)


class Prefill(_Wrapper):
    """BatchPrefillWithPagedKVCacheWrapper."""

    def plan(self, query_start, indptr, indices, last, *sizes, causal, q_data_type, sm_scale):
        self._planned(query_start, indptr, indices, last, sizes, causal, q_data_type, sm_scale)


class Cascade:
    """MultiLevelCascadeAttentionWrapper."""

    def __init__(self, levels, workspace, layout):
        self.levels = [Prefill(workspace, layout) for _ in range(levels)]

    def plan(self, starts, indptrs, indices, lasts, *sizes, causal, **options):
        for level, *lists in zip(self.levels, starts, indptrs, indices, lasts, strict=True):
            level.plan(*lists, *sizes, causal=causal and level is self.levels[-1], **options)

    def run(self, query, cache):
        output, lse = self.levels[-1].attend(query, cache)
        for level in self.levels[:-1]:
            part, part_lse = level.attend(query, cache)
            merge(output, output.clone(), lse, part, part_lse)
            lse = torch.logaddexp(lse, part_lse)
        return output


FLASHINFER = types.SimpleNamespace(
    BatchDecodeWithPagedKVCacheWrapper=Decode,
    BatchPrefillWithPagedKVCacheWrapper=Prefill,
    MultiLevelCascadeAttentionWrapper=Cascade,
)
