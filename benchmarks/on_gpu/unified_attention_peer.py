"""vLLM's Triton kernel ``unified_attention`` as a peer: called as its TRITON_ATTN backend calls it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from types import ModuleType

import torch

from on_gpu.peer import PAGE_SIZE, Absent, Peer, Side, Sources, Unserved, source_version
from on_gpu.sources import is_installed, load, shim_vllm
from on_gpu.step import Step

NAME = "vLLM unified_attention"
#: As vllm/v1/attention/backends/triton_attn.py has it.
_SEGMENTS = 16
_OPS = "vllm.v1.attention.ops"


class UnifiedAttention:
    """One of its two kernels: "3D" splits a request's keys into segments, and serves decode alone."""

    def __init__(self, kernel: ModuleType, step: Step, split: bool):
        self.name = f"{NAME}, {'3D' if split else '2D'}"
        self._attend, self._step, self.output = kernel.unified_attention, step, step.output()
        self._table, self._caches = step.table(PAGE_SIZE), step.caches(PAGE_SIZE)
        self._buffers: dict[str, object] = {}
        if split:
            tokens, shape = step.batch.tokens, step.shape
            padded = 1 << (shape.head_size - 1).bit_length()
            segments = (tokens, shape.num_heads, _SEGMENTS)
            new = torch.empty(*segments, padded, device=step.device)
            self._buffers = {
                "seq_threshold_3D": tokens,
                "num_par_softmax_segments": _SEGMENTS,
                "softmax_segm_output": new,
                "softmax_segm_max": torch.empty(segments, device=step.device),
                "softmax_segm_expsum": torch.empty(segments, device=step.device),
            }

    def prepare(self) -> None:
        """Nothing: the kernel finds out by itself who is where."""

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        step = self._step
        keys, values = self._caches[layer]
        self._attend(
            q=step.query,
            k=keys,
            v=values,
            out=self.output,
            cu_seqlens_q=step.query_start,
            max_seqlen_q=step.most_new,
            seqused_k=step.seq_lens,
            max_seqlen_k=step.longest,
            softmax_scale=step.scale,
            causal=True,
            window_size=(-1, -1),
            block_table=self._table,
            softcap=0.0,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            **self._buffers,
        )


def find(sources: Sources, device: torch.device) -> Peer:
    """The kernel out of a carried source tree, or of the installed vLLM."""
    if sources.vllm:
        shim_vllm(sources.vllm)
        version = source_version(sources.vllm / "vllm")
    elif device.type == "cuda" and is_installed("vllm"):
        version = metadata.version("vllm")
    else:
        raise Absent("vLLM is not installed and no --vllm-source was given")
    kernel = load(f"{_OPS}.triton_unified_attention")

    def sides(step: Step) -> Sequence[Side]:
        if step.shape.num_heads // step.shape.num_kv_heads > _SEGMENTS:
            raise Unserved("more query heads a KV head than its least tile has rows")
        ways = (False, True) if step.batch.decodes else (False,)
        return [UnifiedAttention(kernel, step, split) for split in ways]

    return Peer(NAME, version, sides)
