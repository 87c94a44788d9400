"""Runs a compiled attention kernel on a GPU: one copy of a work list a step, a few launches a layer.

Nothing here waits for the GPU. What a step needs goes to the device through pinned memory into buffers that are made
once, so that a captured CUDA graph serves any step that :meth:`GpuAttentionRunner.begin_step` prepared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.kernels.gpu.launch import Launch, emulated
from llmir.kernels.gpu.programs import programs
from llmir.kernels.gpu.step import HEADER_FIELDS, item_counts, pack
from llmir.kernels.work_list import ITEM_FIELDS
from llmir.plan import PlannedKernel
from llmir.runtime.layers import heads
from llmir.runtime.runs import Int32
from llmir.runtime.schedule import Schedule, Scheduler
from llmir.runtime.split import ByLaunch
from llmir.runtime.step import Step

#: Copies to the device that may be under way: frameworks prepare a step while the GPU works on the last.
STAGING_BUFFERS = 4
#: Addresses (bytes) and strides (elements) that the programs count on.
ALIGNMENT = 16
#: Multiprocessors that work lists are cut for where there is no GPU.
EMULATED_MULTIPROCESSORS = 4
#: Levels of shared prefixes of every request that there is room for; a step with more shares nothing, and is counted.
SHARED_LEVELS = 4


@dataclass(frozen=True)
class StepLimits:
    """The largest step there will be."""

    requests: int
    tokens: int
    """New tokens of all requests."""


class GpuAttentionRunner:
    """One kernel with the buffers its calls need; every layer of its spec shares it.

    Not for concurrent use: the layers of a model run one after the other, on one stream.
    """

    def __init__(self, spec: KernelSpec, policy: StepPolicy, limits: StepLimits, device: torch.device):
        """Compiles the programs of ``spec`` for ``device`` and allocates for steps within ``limits``.

        Raises KernelError where the device is not what ``spec`` was made for, or Triton cannot compile.
        """
        self.spec = spec
        self._device = device
        self._check_device()
        self._launches = {p.name: Launch(p, spec.isa) for p in programs(spec, emulated=emulated())}
        self._variants = [self._launches[variant.name] for variant in spec.gpu_variants]
        self._prefill = [variant.name for variant in spec.gpu_variants].index("prefill")
        multiprocessors = _multiprocessors(device)
        self._programs = [multiprocessors * launch.resident_blocks for launch in self._variants]
        self._merge_programs = multiprocessors * self._launches["merge"].resident_blocks
        self._scheduler = Scheduler(spec, policy)
        room = _Room.of(spec, policy, limits, self._programs)
        self._step = torch.zeros(room.numbers, dtype=torch.int32, device=device)
        self._staging = _Staging(room.numbers, device)
        rows, size = spec.attention.num_kv_heads * room.state_rows, spec.attention.head_size
        self._room = room
        self._state_stats = torch.empty(rows * 2, dtype=torch.float32, device=device)
        self._state_values = torch.empty(rows * size, dtype=torch.float32, device=device)
        self._counts = [0] * len(self._variants)
        self._merges = 0

    @classmethod
    def load(cls, kernel: PlannedKernel, limits: StepLimits, device: torch.device) -> GpuAttentionRunner:
        """What runs a plan's kernel; KernelError where that cannot be compiled for ``device``."""
        return cls(kernel.spec, kernel.policy, limits, device)

    def begin_step(self, step: Step, threads: int = 0) -> Schedule:
        """Prepares the calls of one step and gives its work list.

        ``threads``: thread blocks to cut each launch's work for, at most as many as the GPU runs at a time; 0: so many.
        """
        blocks = [threads] * len(self._variants) if threads else self._programs
        by_launch = ByLaunch(blocks, self._prefill)
        schedule = self._scheduler.schedule(step, by_launch)
        packed = self._packed(schedule)
        if not self._room.holds(packed, schedule):
            schedule = replace(self._scheduler.schedule(step.without_table(), by_launch), without_room=True)
            packed = self._packed(schedule)
        if not self._room.holds(packed, schedule):
            raise KernelError(
                f"a step of {len(step.seq_lens)} requests and {int(step.query_start[-1])} tokens is larger than the "
                f"largest that was announced"
            )
        self._staging.copy(packed, self._step)
        self._counts = item_counts(packed, len(self._variants))
        self._merges = schedule.merges.count
        return schedule

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        cache: torch.Tensor,
        block_table: torch.Tensor,
        slots: torch.Tensor,
        append_tokens: int,
        *,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        """Appends a layer's new keys and values to its cache, then attends, for the step begun last.

        On the device: ``query`` and ``output`` [tokens, heads, head_size], ``key`` and ``value``
        [tokens, KV heads, head_size], heads of a token side by side; ``cache`` [blocks, KV heads, 2, block_size,
        head_size] in any shape of that order; ``block_table`` int32 [requests, columns]; ``slots`` int64 [tokens],
        negative where a token is not kept; ``key_scale`` and ``value_scale`` float32 [1] where the cache is quantized;
        ``sinks`` [heads] where the layer has them, in the queries' type. With ``append_tokens`` 0 the cache is only
        read. While a CUDA graph is captured, grids do not depend on the step.
        """
        s = self.spec.attention
        captured = self._is_captured()
        scales = (key_scale, value_scale) if s.cache.quantized else ()
        own_sinks = (sinks,) if s.sinks else ()
        if append_tokens:
            strides = _stride("key", key), _stride("value", value)
            self._launches["append"]((append_tokens, 1, 1), key, value, cache, slots, *scales, *strides)
        states = self._state_stats, self._state_values
        query_stride, output_stride = _stride("query", query), _stride("output", output)
        for launch, count, most in zip(self._variants, self._counts, self._programs, strict=True):
            if captured or count:
                grid = most if captured else count * s.num_kv_heads
                tensors = (query, cache, block_table, self._step, *states, *own_sinks, *scales, output)
                launch((grid, 1, 1), *tensors, query_stride, output_stride, block_table.stride(0))
        # There are no more merges than tokens.
        merges = min(query.shape[0] * s.num_heads, self._merge_programs) if captured else self._merges * s.num_heads
        if merges:
            self._launches["merge"]((merges, 1, 1), self._step, *states, *own_sinks, output, output_stride)

    def _is_captured(self) -> bool:
        """Whether launches go into a CUDA graph."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _packed(self, schedule: Schedule) -> Int32:
        merges = schedule.merges
        arrays = (merges.tokens, merges.begin, merges.sources, merges.members)
        return pack(schedule.items, len(self._variants), arrays, merges.state_rows)

    def _check_device(self) -> None:
        """Raise KernelError unless the kernel was made for the architecture of the device."""
        if emulated():
            return
        found = architecture(self._device)
        if found != self.spec.isa:
            raise KernelError(f"the plan was made for {self.spec.isa}, and this GPU is {found}: compile it again here")


@dataclass(frozen=True)
class _Room:
    """What the buffers hold."""

    numbers: int
    """int32 of a packed step."""
    state_rows: int
    """Rows of states of one KV head."""

    @classmethod
    def of(cls, spec: KernelSpec, policy: StepPolicy, limits: StepLimits, threads: Sequence[int]) -> _Room:
        """Enough for any step within ``limits`` that shares nothing, and for usual ones that share.

        A tile that is split is more than one part in so many of its launch, so there are fewer split tiles than parts,
        and at most twice as many pieces. Who shares leaves a state of its own part and one a level. ``threads``: of
        each variant, thread blocks that run at a time.
        """
        s, variants = spec.attention, spec.variants
        pieces = [2 * -(-policy.items_per_thread * count // s.num_kv_heads) for count in threads]
        tiles = limits.requests + -(-limits.tokens // min(v.max_tokens for v in variants))
        shared = limits.requests if policy.sharing is not None else 0
        own_rows = spec.variant("decode").row_tile + SHARED_LEVELS * s.queries_per_kv
        state_rows = sum(count * v.row_tile for count, v in zip(pieces, variants, strict=True))
        state_rows += shared * own_rows + SHARED_LEVELS * max(v.row_tile for v in variants)
        items = tiles + sum(pieces) + SHARED_LEVELS * shared
        tokens = limits.tokens + sum(count * v.max_tokens for count, v in zip(pieces, variants, strict=True))
        merges = 3 * tokens + 1 + 2 * SHARED_LEVELS * shared
        return cls(HEADER_FIELDS + items * ITEM_FIELDS + merges, state_rows)

    def holds(self, packed: Int32, schedule: Schedule) -> bool:
        """Whether a step fits."""
        return len(packed) <= self.numbers and schedule.merges.state_rows <= self.state_rows


class _Staging:
    """Pinned memory from which steps are copied to the device, each again only when its last copy is over."""

    def __init__(self, numbers: int, device: torch.device):
        self._pinned = device.type == "cuda"
        count = STAGING_BUFFERS if self._pinned else 1
        self._buffers = [torch.empty(numbers, dtype=torch.int32, pin_memory=self._pinned) for _ in range(count)]
        self._copied: list[Any] = [torch.cuda.Event() if self._pinned else None for _ in range(count)]
        self._next = 0

    def copy(self, numbers: Int32, device_buffer: torch.Tensor) -> None:
        """Copy ``numbers`` to the beginning of ``device_buffer``, on the current stream."""
        buffer, copied = self._buffers[self._next], self._copied[self._next]
        self._next = (self._next + 1) % len(self._buffers)
        if copied is not None:
            copied.synchronize()  # of a copy that was begun STAGING_BUFFERS steps ago
        size = len(numbers)
        buffer.numpy()[:size] = numbers
        device_buffer[:size].copy_(buffer[:size], non_blocking=True)
        if copied is not None:
            copied.record()


def architecture(device: torch.device) -> str:
    """The name that targets have for a GPU, such as sm_90 or gfx942."""
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _multiprocessors(device: torch.device) -> int:
    if emulated():
        return EMULATED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _stride(what: str, tensor: torch.Tensor) -> int:
    """Elements from one token to the next; ValueError where the programs' assumptions do not hold."""
    tokens, count, size = tensor.shape
    address, token = heads(tensor, size)
    if tokens == 1:
        token = count * size  # of one token a framework may say anything
    if token % ALIGNMENT or address % ALIGNMENT:
        raise ValueError(f"{what} must begin at a multiple of {ALIGNMENT} bytes and {ALIGNMENT} elements")
    return token
