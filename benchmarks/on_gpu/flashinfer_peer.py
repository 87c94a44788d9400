"""FlashInfer as a peer: its wrappers for decode, prefill and shared prefixes.

Compiling its kernels takes minutes, so it is done before:

    FLASHINFER_CUDA_ARCH_LIST=9.0a PYTHONPATH=.:benchmarks python -m on_gpu.flashinfer_peer --flashinfer DIR

compiles what benchmarks/gpu.py uses, with nvcc (CUDA_HOME) and ninja, on any machine, and leaves it in DIR beside
FlashInfer's Python, where it is found wherever DIR is carried to. Without ``--flashinfer`` it is done for the installed
package, in its own cache.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from on_gpu.peer import PAGE_SIZE, Absent, Peer, Side, Sources, Unserved
from on_gpu.step import Step

NAME = "FlashInfer"
#: Of partial results; its documentation recommends 128 MiB, which the largest batches here overflow.
_WORKSPACE_BYTES = 512 << 20
#: As flashinfer/data/include/flashinfer/utils.cuh has them.
_HEAD_SIZES = (64, 128, 256)


def page_lists(step: Step, ranges: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FlashInfer's ``indptr``, ``indices`` and ``last_page_len`` of (request, begin, end), int32.

    The first and last stay on the host, where plans are made.
    """
    table = step.host_table(PAGE_SIZE)
    lists = [table[request, begin // PAGE_SIZE : -(-end // PAGE_SIZE)] for request, begin, end in ranges]
    indptr = np.append(0, np.cumsum([len(pages) for pages in lists])).astype(np.int32)
    last = np.array([(end - 1) % PAGE_SIZE + 1 for _, _, end in ranges], np.int32)
    indices = torch.from_numpy(np.concatenate(lists).astype(np.int32)).to(step.device)
    return torch.from_numpy(indptr), indices, torch.from_numpy(last)


class Wrapped:
    """A wrapper with what it is planned with. ``into``: whether it takes an output; its cascade makes one itself."""

    def __init__(
        self, name: str, step: Step, wrapper: Any, plan: tuple[object, ...], *, into: bool = True, **options: object
    ):
        self.name, self.output, self._step, self._caches = name, step.output(), step, step.caches(PAGE_SIZE)
        self._wrapper, self._plan = wrapper, plan
        self._into = {"out": self.output} if into else {}
        self._options = {"q_data_type": step.query.dtype, "sm_scale": step.scale} | options

    def prepare(self) -> None:
        """The plan."""
        shape = self._step.shape
        sizes = (shape.num_heads, shape.num_kv_heads, shape.head_size, PAGE_SIZE)
        self._wrapper.plan(*self._plan, *sizes, **self._options)

    def run(self, layer: int) -> None:
        """See :class:`peers.Side`."""
        self.output = self._wrapper.run(self._step.query, self._caches[layer], **self._into)


def sides_of(flashinfer: ModuleType, step: Step, workspace: torch.Tensor) -> list[Side]:
    """How FlashInfer serves a step."""
    if step.shape.head_size not in _HEAD_SIZES:
        raise Unserved(f"it has no kernels for heads of {step.shape.head_size}")
    batch = step.batch
    lists = page_lists(step, [(request, 0, int(end)) for request, end in enumerate(batch.seq_lens)])
    found: list[Side] = []
    if batch.decodes:
        # Its documentation advises tensor cores for grouped queries.
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        found.append(Wrapped(f"{NAME} decode", step, wrapper, lists))
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        query_start = torch.from_numpy(batch.query_start)
        found.append(Wrapped(f"{NAME} prefill", step, wrapper, (query_start, *lists), causal=True))
    if batch.shared:
        found.append(cascade(flashinfer, step, workspace))
    return found


def cascade(flashinfer: ModuleType, step: Step, workspace: torch.Tensor) -> Side:
    """A level for each of the prefix tree, and one for what requests have alone."""
    batch = step.batch
    starts, plans, begin = [], [], 0
    for groups, tokens in batch.shared:
        group = [batch.group(request, groups) for request in range(batch.requests)]
        first = [group.index(number) for number in range(groups)]
        starts.append(batch.query_start[[*first, batch.requests]])
        plans.append(page_lists(step, [(request, begin, begin + tokens) for request in first]))
        begin += tokens
    starts.append(batch.query_start)
    plans.append(page_lists(step, [(request, begin, int(end)) for request, end in enumerate(batch.seq_lens)]))
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(plans), workspace, "NHD")
    arguments = ([torch.from_numpy(start) for start in starts], *(list(column) for column in zip(*plans, strict=True)))
    return Wrapped(f"{NAME} cascade", step, wrapper, arguments, into=False, causal=True)


def imported(folder: Path | None) -> ModuleType:
    """FlashInfer from a folder, or as it is installed."""
    if folder:
        sys.path.insert(0, str(folder))
    import flashinfer

    return flashinfer


def kernels() -> list[Any]:
    """FlashInfer's records of the kernels for bf16 and heads of 128: decode and prefill on tensor cores, merging."""
    from flashinfer.jit.attention import gen_batch_prefill_module
    from flashinfer.jit.cascade import gen_cascade_module

    kind, size, no = torch.bfloat16, 128, False
    arguments = (kind, kind, kind, torch.int32, size, size, 0, no, no, no)
    return [*(gen_batch_prefill_module(backend, *arguments) for backend in ("fa2", "fa3")), gen_cascade_module()]


def find(sources: Sources, device: torch.device) -> Peer:
    """FlashInfer as it is installed or was carried."""
    if device.type != "cuda":
        raise Absent("it is compiled for CUDA alone")
    flashinfer = imported(sources.flashinfer)
    missing = [kernel.name for kernel in kernels() if not kernel.is_compiled]
    if missing:
        raise Absent(f"{', '.join(missing)} not compiled: see benchmarks/on_gpu/flashinfer_peer.py")
    workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    return Peer(NAME, flashinfer.__version__, lambda step: sides_of(flashinfer, step, workspace))


def main() -> None:
    """Compiles FlashInfer's kernels for benchmarks/gpu.py."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--flashinfer", type=Path, metavar="DIR", help="folder that holds the package flashinfer")
    folder = parser.parse_args().flashinfer
    imported(folder)
    for kernel in kernels():
        kernel.build(verbose=False)
        if folder:  # where FlashInfer looks for what was compiled ahead of time, whatever its paths are then
            kernel.aot_path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(kernel.jit_library_path, kernel.aot_path)
        print(f"{kernel.name}: {kernel.get_library_path()}", flush=True)


if __name__ == "__main__":
    main()
