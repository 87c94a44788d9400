"""FlashAttention as vLLM ships it, as a peer: version 3 where it is here, else 2, called as its backend calls it.

The attention of a prefix that all requests share is also timed as vLLM's cascade does it: once for the prefix, once
for the rest of each request, then merged.
"""

from __future__ import annotations

import lzma
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch

from on_gpu.peer import PAGE_SIZE, Absent, Peer, Side, Sources, source_version
from on_gpu.sources import capability, is_installed, load, shim_vllm
from on_gpu.step import Step

NAME = "FlashAttention"
_LIBRARY = "_vllm_fa3_C.abi3.so"
#: Version 3 reads pages of a whole tile of keys (128 of a causal head of 128) by the copy engine, smaller ones by
#: address; vLLM's default is 16.
_PAGE_SIZES = (PAGE_SIZE, 128)


class FlashAttention:
    """``flash_attn_varlen_func`` over pages of some size."""

    def __init__(self, interface: ModuleType, version: int, step: Step, page_size: int):
        self.name = f"{NAME} {version}, pages of {page_size}"
        self._interface, self._version, self._step, self._page_size = interface, version, step, page_size
        self._table, self._caches = step.table(page_size), step.caches(page_size)
        self.output = step.output()
        self._schedule: object = None

    def prepare(self) -> None:
        """The schedule, which version 3 makes ahead."""
        if self._version == 3:
            step = self._step
            self._schedule = self._scheduled(step.query_start, step.most_new, step.seq_lens, step.longest, True)

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        step = self._step
        self._call(
            layer,
            cu_seqlens_q=step.query_start,
            max_seqlen_q=step.most_new,
            seqused_k=step.seq_lens,
            max_seqlen_k=step.longest,
            causal=True,
            block_table=self._table,
            scheduler_metadata=self._schedule,
            out=self.output,
        )

    def _scheduled(
        self, query_start: torch.Tensor, most_new: int, seq_lens: torch.Tensor, longest: int, causal: bool
    ) -> object:
        shape = self._step.shape
        return self._interface.get_scheduler_metadata(
            batch_size=len(seq_lens),
            max_seqlen_q=most_new,
            max_seqlen_k=longest,
            num_heads_q=shape.num_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_size,
            cache_seqlens=seq_lens,
            qkv_dtype=self._step.query.dtype,
            cu_seqlens_q=query_start,
            page_size=self._page_size,
            causal=causal,
        )

    def _call(self, layer: int, **arguments: object) -> object:
        keys, values = self._caches[layer]
        return self._interface.flash_attn_varlen_func(
            q=self._step.query,
            k=keys,
            v=values,
            softmax_scale=self._step.scale,
            fa_version=self._version,
            **arguments,
        )


class Cascade(FlashAttention):
    """What all requests share, read once; then the rest of each; then both merged."""

    def __init__(self, interface: ModuleType, merge: ModuleType, version: int, step: Step, page_size: int):
        super().__init__(interface, version, step, page_size)
        self.name += ", cascade"
        self._merge, self._common = merge.merge_attn_states, step.batch.shared[0][1]
        tokens, device = step.batch.tokens, step.device
        self._prefix_start = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self._prefix_len = torch.tensor([self._common], dtype=torch.int32, device=device)
        self._rest_lens = step.seq_lens - self._common
        self._rest_table = self._table[:, self._common // page_size :]
        self._longest_rest = step.longest - self._common
        self._schedules: tuple[object, object] = (None, None)

    def prepare(self) -> None:
        """The schedules of both passes."""
        step = self._step
        if self._version == 3:
            tokens = step.batch.tokens
            self._schedules = (
                self._scheduled(self._prefix_start, tokens, self._prefix_len, self._common, False),
                self._scheduled(step.query_start, step.most_new, self._rest_lens, self._longest_rest, True),
            )

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        step = self._step
        prefix = self._call(
            layer,
            cu_seqlens_q=self._prefix_start,
            max_seqlen_q=step.batch.tokens,
            seqused_k=self._prefix_len,
            max_seqlen_k=self._common,
            causal=False,
            block_table=self._table[:1],
            scheduler_metadata=self._schedules[0],
            return_softmax_lse=True,
        )
        rest = self._call(
            layer,
            cu_seqlens_q=step.query_start,
            max_seqlen_q=step.most_new,
            seqused_k=self._rest_lens,
            max_seqlen_k=self._longest_rest,
            causal=True,
            block_table=self._rest_table,
            scheduler_metadata=self._schedules[1],
            return_softmax_lse=True,
        )
        self._merge(self.output, *prefix, *rest)  # type: ignore[misc]


def find(sources: Sources, device: torch.device) -> Peer:
    """Out of a carried library and its Python, or of the installed vLLM."""
    if device.type != "cuda":
        raise Absent("it is compiled for CUDA alone")
    if sources.fa3 and not sources.vllm:
        raise Absent("--fa3 gives the library alone: the Python that calls it comes with --vllm-source")
    if sources.vllm:
        shim_vllm(sources.vllm, *([unpacked(sources.fa3).parent] if sources.fa3 else []))
        version = source_version(sources.vllm / "vllm")
    elif is_installed("vllm"):
        version = metadata.version("vllm")
    else:
        raise Absent("vLLM is not installed and no --vllm-source and --fa3 were given")
    interface = load("vllm.vllm_flash_attn.flash_attn_interface")
    merge = load("vllm.v1.attention.ops.triton_merge_attn_states")
    number = 3 if interface.FA3_AVAILABLE and capability()[0] == 9 else 2
    if number == 2 and not interface.FA2_AVAILABLE:
        raise Absent(f"{interface.FA3_UNAVAILABLE_REASON}; {interface.FA2_UNAVAILABLE_REASON}")

    def sides(step: Step) -> Sequence[Side]:
        sizes = _PAGE_SIZES if number == 3 else (PAGE_SIZE,)
        found: list[Side] = [FlashAttention(interface, number, step, size) for size in sizes]
        if step.batch.shared and step.batch.shared[0][0] == 1:
            found.append(Cascade(interface, merge, number, step, sizes[-1]))
        return found

    return Peer(f"{NAME} {number}", f"of vLLM {version}", sides)


def unpacked(file: Path) -> Path:
    """The library itself, out of a file that xz has packed where its name says so."""
    if file.suffix != ".xz":
        return file
    target = Path(tempfile.mkdtemp(prefix="llmir-benchmark-")) / _LIBRARY
    with lzma.open(file) as packed, target.open("wb") as library:
        while chunk := packed.read(1 << 24):
            library.write(chunk)
    return target
