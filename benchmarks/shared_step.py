"""A decode step of requests that share prefixes, run with sharing and without, by one kernel on one KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import cycle, islice

import numpy as np
import torch
from attention_step import Case, stored
from llmir_attention import plan_kernel

from llmir import compiler
from llmir.ir.dtypes import DTYPES
from llmir.kernels import reference
from llmir.kernels.cpu.kernel import Kernel
from llmir.kernels.work_list import Item
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step

PLAIN, SHARED = "plain", "shared"
#: The longest sequence of the model that is compiled.
_LONGEST = 16384
#: Requests whose result is computed in float64, one KV head each.
_CHECKED_REQUESTS = 3
_NOTHING = (0, 0)


@dataclass(frozen=True)
class Shape:
    """The attention of a model."""

    name: str
    num_heads: int
    num_kv_heads: int
    head_size: int
    element_type: str = "bf16"

    @property
    def key_bytes(self) -> int:
        """Bytes of one key and its value, one KV head."""
        return 2 * DTYPES[self.element_type].bytes_of(1) * self.head_size

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in the cache of one layer."""
        return self.num_kv_heads * self.key_bytes


@dataclass(frozen=True)
class Batch:
    """Requests that decode one token each."""

    name: str
    shape: Shape
    shared: tuple[tuple[int, int], ...]
    """Levels of the prefix tree from its root: (groups, tokens). Request r is in group r % groups of each level, so the
    requests of a group do not lie side by side."""
    own: tuple[int, ...]
    """Tokens that a request shares with no other, the new one included."""

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self.own)

    @property
    def seq_lens(self) -> np.ndarray:
        """Tokens of each request, the new one included: int32 ``[requests]``."""
        return np.array(self.own, np.int32) + np.int32(sum(tokens for _, tokens in self.shared))

    def block_table(self, block_size: int, seed: int = 1) -> tuple[np.ndarray, int]:
        """Blocks in random places, as after long serving: int32 ``[requests, columns]``, and how many blocks there are.

        Requests of a group have the same blocks where a block lies wholly in what they share.
        """
        blocks = -(-self.seq_lens // block_size)
        name = np.full((self.requests, int(blocks.max())), -1, np.int64)
        begin = tokens = used = 0
        for groups, length in self.shared:
            tokens += length
            width = tokens // block_size - begin
            for request in range(self.requests):
                first = used + request % groups * width
                name[request, begin : begin + width] = np.arange(first, first + width)
            begin, used = begin + width, used + groups * width
        for request, count in enumerate(blocks):
            name[request, begin:count] = np.arange(used, used + count - begin)
            used += int(count) - begin
        places = np.random.default_rng(seed).permutation(used)
        return np.where(name < 0, 0, places[name]).astype(np.int32), used


class SharingKernel:
    """The kernel of one shape as the compiler decides it on this machine, with sharing and without, and memory to read.

    ``isa``: the instruction set to use; this machine's best if None. ``pages``: ``[blocks, KV heads, page]``, normally
    distributed: the caches of as many layers as fit.
    """

    def __init__(self, shape: Shape, block_size: int, cache_bytes: int, isa: str | None = None):
        heads = shape.num_heads, shape.num_kv_heads, shape.head_size
        case = Case(shape.name, *heads, 1, _LONGEST, 1, shape.element_type)
        planned = plan_kernel(case, block_size, isa)
        self.block_size, self.spec, self.policy = block_size, planned.spec, planned.policy
        self.loaded = Kernel.load(planned.spec, compiler.object_cache())
        plain = CpuAttentionRunner(self.loaded, replace(self.policy, sharing=None))
        self.runners = {PLAIN: plain, SHARED: CpuAttentionRunner(self.loaded, self.policy)}
        page = planned.spec.attention.cache.head_block_bytes
        blocks = -(-cache_bytes // (page * shape.num_kv_heads))
        generator = torch.Generator().manual_seed(0)
        size = (blocks, shape.num_kv_heads, page // case.dtype.itemsize)
        self.pages = torch.empty(size, dtype=case.dtype).normal_(generator=generator)


class SharedStep:
    """A step ready to run on ``threads`` threads, once for each layer.

    A call takes the cache of the next layer, as a model does: what it reads has left the processor's caches since it
    was read last, as far as ``kernel.pages`` is larger than they are.
    """

    def __init__(self, batch: Batch, kernel: SharingKernel, threads: int):
        shape = batch.shape
        self.batch, self.kernel, self.threads = batch, kernel, threads
        self.table, self.blocks = batch.block_table(kernel.block_size)
        self.layers = len(kernel.pages) // self.blocks
        self.query_start = np.arange(batch.requests + 1, dtype=np.int32)
        self.seq_lens = batch.seq_lens
        generator = torch.Generator().manual_seed(2)
        size = (batch.requests, shape.num_heads, shape.head_size)
        self.query = torch.empty(size, dtype=kernel.pages.dtype).normal_(generator=generator)
        self.output = {side: torch.full_like(self.query, torch.nan) for side in (PLAIN, SHARED)}
        layer_bytes = self.blocks * kernel.pages.stride(0) * kernel.pages.element_size()
        self._caches = cycle([kernel.pages.data_ptr() + layer * layer_bytes for layer in range(self.layers)])
        self.schedules = {side: self.begin(kernel.runners[side]) for side in (PLAIN, SHARED)}

    def begin(self, runner: CpuAttentionRunner) -> Schedule:
        """Prepares the step: its work list."""
        return runner.begin_step(Step(self.query_start, self.seq_lens, self.table), self.threads)

    @property
    def alike(self) -> bool:
        """Whether both sides do the same work in the same order."""
        return np.array_equal(self.schedules[PLAIN].items, self.schedules[SHARED].items)

    @property
    def bytes_not_read(self) -> int:
        """Bytes of keys and values of one layer that work items with sharing do not read and those without do."""
        items = {side: schedule.items for side, schedule in self.schedules.items()}
        keys = {side: int((rows[:, Item.KEY_END] - rows[:, Item.KEY_BEGIN]).sum()) for side, rows in items.items()}
        return (keys[PLAIN] - keys[SHARED]) * self.batch.shape.key_bytes

    def run(self, side: str, calls: int) -> None:
        """Attention of the next ``calls`` layers."""
        self._attend(side, islice(self._caches, calls))

    def _attend(self, side: str, caches: Iterable[int]) -> None:
        attend = self.kernel.runners[side].attend
        query = (self.query.data_ptr(), self.query.stride(0))
        output = (self.output[side].data_ptr(), self.output[side].stride(0))
        for cache in caches:
            attend(query, _NOTHING, _NOTHING, output, cache, 0, 0)

    def errors(self) -> dict[str, float]:
        """Relative errors of the first layer's output.

        "plain" and "shared": against float64, for some requests and one KV head; "between": of all that sharing gives
        against all that it gives without.
        """
        for side, output in self.output.items():
            output.fill_(torch.nan)
            self._attend(side, [self.kernel.pages.data_ptr()])
        plain, shared = (stored(self.output[side]) for side in (PLAIN, SHARED))
        requests = np.unique(np.linspace(0, self.batch.requests - 1, _CHECKED_REQUESTS).round().astype(int))
        head = self.batch.shape.num_kv_heads - 1
        exact = self._exact(requests, head)
        rows = np.ix_(requests, self._query_heads(head))
        return {
            PLAIN: reference.relative_error(plain[rows], exact),
            SHARED: reference.relative_error(shared[rows], exact),
            "between": reference.relative_error(shared, reference.decode(plain)),
        }

    def _query_heads(self, head: int) -> np.ndarray:
        """The query heads of one KV head."""
        count = self.kernel.spec.attention.queries_per_kv
        return np.arange(head * count, (head + 1) * count)

    def _exact(self, requests: np.ndarray, head: int) -> np.ndarray:
        """The float64 result of some requests and one KV head in the first layer: ``[requests, heads, head_size]``."""
        table = self.table[requests]
        blocks, place = np.unique(table, return_inverse=True)
        attention = replace(
            self.kernel.spec.attention, num_heads=self.kernel.spec.attention.queries_per_kv, num_kv_heads=1
        )
        pages = stored(self.kernel.pages)[blocks, head : head + 1]
        return reference.attention(
            stored(self.query)[np.ix_(requests, self._query_heads(head))],
            *reference.unpack_pages(pages, attention.cache, self.kernel.spec.isa),
            place.reshape(table.shape),
            self.seq_lens[requests],
            np.arange(len(requests) + 1),
            attention,
        )
