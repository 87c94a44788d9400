"""Runs a compiled attention kernel on a CPU: one work list a step, one call a layer."""

from __future__ import annotations

import ctypes

import numpy as np

from llmir.ir.kernel_spec import StepPolicy
from llmir.kernels.cpu.abi import Arguments, state_bytes
from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.cpu.object_cache import ObjectCache
from llmir.kernels.work_list import ITEM_FIELDS, Item
from llmir.plan import PlannedKernel
from llmir.runtime.runs import Int32
from llmir.runtime.schedule import Schedule, Scheduler
from llmir.runtime.split import ByThread
from llmir.runtime.step import Step


class CpuAttentionRunner:
    """One kernel with the buffers its calls need; every layer of its spec shares it.

    Not for concurrent use: the layers of a model run one after the other.
    """

    def __init__(self, kernel: Kernel, policy: StepPolicy):
        self.spec = kernel.spec
        self._scheduler = Scheduler(kernel.spec, policy)
        self._call = kernel.function
        self._arguments = Arguments(**kernel.openmp)
        self._address = ctypes.addressof(self._arguments)
        self._state_bytes = kernel.spec.attention.num_kv_heads * state_bytes(kernel.spec)
        self._buffers: dict[str, tuple[np.ndarray, int]] = {}
        """Each with the address in it that is used."""
        self._step: tuple[Schedule, Int32, Int32, Int32 | None] | None = None

    @classmethod
    def load(cls, kernel: PlannedKernel, object_cache: ObjectCache) -> CpuAttentionRunner:
        """What runs a plan's kernel; KernelError where that cannot be loaded."""
        return cls(Kernel.load(kernel.spec, object_cache), kernel.policy)

    def begin_step(self, step: Step, threads: int) -> Schedule:
        """Prepares the calls of one step and gives its work list; its block table must stay until the step is over."""
        block_table = step.block_table
        assert block_table is not None, "on a CPU the kernel reads the host's block table"
        schedule = self._scheduler.schedule(step, ByThread(threads))
        merges, arguments = schedule.merges, self._arguments
        items = _of_all_heads(schedule.items, self.spec.attention.num_kv_heads)
        arguments.items = items.ctypes.data
        arguments.item_count = len(items)
        arguments.block_table = block_table.ctypes.data
        arguments.block_table_stride = block_table.strides[0] // block_table.itemsize
        arguments.threads = threads
        arguments.members = merges.members.ctypes.data
        arguments.merge_tokens = merges.tokens.ctypes.data
        arguments.merge_begin = merges.begin.ctypes.data
        arguments.merge_sources = merges.sources.ctypes.data
        arguments.merges, arguments.state_rows = merges.count, merges.state_rows
        arguments.states = self._buffer("states", merges.state_rows * self._state_bytes)
        arguments.merge_counters = self._buffer("merge_counters", merges.count * 4 * self.spec.attention.num_kv_heads)
        positions = step.positions() if self.spec.attention.alibi else None
        arguments.positions = None if positions is None else positions.ctypes.data
        self._step = (schedule, items, block_table, positions)  # keeps what the kernel has addresses of
        return schedule

    def attend(
        self,
        query: tuple[int, int],
        key: tuple[int, int],
        value: tuple[int, int],
        output: tuple[int, int],
        cache: int,
        slots: int,
        append_tokens: int,
        sinks: int = 0,
        slopes: int = 0,
    ) -> None:
        """Appends a layer's new keys and values to its cache, then attends, for the step begun last.

        Each tensor is its address and the elements from one token to the next; a token's heads are contiguous.
        ``cache`` [blocks, KV heads, page] and ``slots`` int64 [append_tokens] are addresses. With
        ``append_tokens`` 0 the cache is only read, and ``key``, ``value`` and ``slots`` are not looked at. ``sinks``
        and ``slopes``, where the spec has sinks or ALiBi: float32 [heads], addresses.
        """
        arguments = self._arguments
        arguments.query, arguments.query_stride = query
        arguments.key, arguments.key_stride = key
        arguments.value, arguments.value_stride = value
        arguments.output, arguments.output_stride = output
        arguments.cache = cache
        arguments.slots = slots
        arguments.append_tokens = append_tokens
        arguments.sinks, arguments.slopes = sinks, slopes
        self._call(self._address)

    def _buffer(self, name: str, size: int) -> int | None:
        """Address of zeroed bytes, at least ``size``, aligned to a cache line; grown when a step needs more.

        Kernels leave counters at zero, and never read a state they have not written.
        """
        if not size:
            return None
        if name not in self._buffers or len(self._buffers[name][0]) < size + 64:
            buffer = np.zeros(2 * size + 64, np.uint8)
            self._buffers[name] = buffer, -(-buffer.ctypes.data // 64) * 64
        return self._buffers[name][1]


def _of_all_heads(items: Int32, heads: int) -> Int32:
    """The items of every KV head; those of one range of keys follow one another."""
    everywhere = items.repeat(heads, axis=0)
    everywhere.reshape(len(items), heads, ITEM_FIELDS)[:, :, Item.KV_HEAD] = np.arange(heads)
    return everywhere
