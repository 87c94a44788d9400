"""One runner over many steps, as a server uses it: requests come, share what others have cached, grow, and go."""

from __future__ import annotations

import numpy as np
import pytest
import torch  # noqa: F401 - brings the OpenMP runtime
from attention_cases import (
    ROW_ERROR,
    RUNNABLE_ISAS,
    SHARED,
    address,
    aligned,
    begin_step,
    layout_of,
    loaded,
    row_error,
    spec_of,
)

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.kernels import reference
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.step import Step

#: Requests in each step: many and few by turns.
REQUESTS = [1, 2, 8, 12, 12, 3, 1, 1, 20, 24, 24, 24, 5, 2, 1, 30, 30, 6, 6, 1]
POLICY = StepPolicy(decode_tokens=1, split_keys=32, items_per_thread=100, sharing=SHARED)


class Server:
    """Requests with their blocks, and a cache in which blocks that belong to nobody are NaN."""

    def __init__(self, spec: KernelSpec, policy: StepPolicy):
        s = self.attention = spec.attention
        self.spec, self.rng = spec, np.random.default_rng(0)
        self.runner = CpuAttentionRunner(loaded(spec), policy)
        shape = (40 * -(-400 // s.cache.block_size), s.num_kv_heads, s.cache.block_size, s.head_size)
        self.caches = [self.encode(np.full(shape, np.nan)) for _ in range(2)]
        self.pages = aligned(reference.pack_pages(*self.caches, s.cache, spec.isa))
        self.owners = np.zeros(shape[0], np.int64)
        self.lengths: list[int] = []
        self.blocks: list[list[int]] = []

    def encode(self, values: np.ndarray) -> np.ndarray:
        return reference.encode(values.astype(np.float32), self.attention.dtype)

    def normal(self, *shape: int) -> np.ndarray:
        return self.encode(self.rng.standard_normal(shape))

    def come(self) -> None:
        """A request that begins like an earlier one, for as many whole blocks as chance says."""
        blocks: list[int] = []
        if self.blocks:
            other = self.rng.integers(len(self.blocks))
            cached = self.lengths[other] // self.attention.cache.block_size
            blocks = self.blocks[other][: self.rng.integers(cached + 1)]
        self.owners[blocks] += 1
        self.blocks.append(list(blocks))
        self.lengths.append(len(blocks) * self.attention.cache.block_size)

    def go(self) -> None:
        request = self.rng.integers(len(self.blocks))
        blocks = self.blocks.pop(request)
        del self.lengths[request]
        self.owners[blocks] -= 1
        left = [block for block in blocks if not self.owners[block]]
        for cache in (*self.caches, self.pages):
            cache[left] = self.encode(np.full(1, np.nan))

    def step(self, requests: int) -> None:
        """As many requests as asked for, with new tokens each; everything is as the reference says."""
        while len(self.blocks) > requests:
            self.go()
        old = len(self.blocks)
        while len(self.blocks) < requests:
            self.come()
        new = [int(self.rng.choice([1, 1, 1, 2, 3])) for _ in range(old)]
        new += [int(self.rng.integers(1, 60)) for _ in range(requests - old)]
        slots = np.concatenate([self.grow(request, count) for request, count in enumerate(new)])
        s, tokens = self.attention, len(slots)
        query, output = self.normal(tokens, s.num_heads, s.head_size), self.normal(tokens, s.num_heads, s.head_size)
        key, value = (self.normal(tokens, s.num_kv_heads, s.head_size) for _ in range(2))
        # Now each request has its own row, now any other of a table that has more.
        rows = self.rng.permutation(requests + 3)[:requests] if self.rng.integers(2) else np.arange(requests)
        table = np.full((requests + 3, max(map(len, self.blocks)) + 1), 2**31 - 1, np.int32)
        for row, blocks in zip(rows, self.blocks, strict=True):
            table[row, : len(blocks)] = blocks
        starts, lengths = np.cumsum([0, *new]).astype(np.int32), np.array(self.lengths, np.int32)
        begin_step(self.runner, Step(starts, lengths, table, rows), threads=2)
        self.runner.attend(
            *map(address, (query, key, value, output)), self.pages.ctypes.data, slots.ctypes.data, tokens
        )
        reference.append_kv(key, value, slots, *self.caches)
        exact = reference.attention(query, *self.caches, table[rows], lengths, starts, s)
        assert row_error(output, exact) < ROW_ERROR[s.dtype]
        assert self.pages.tobytes() == reference.pack_pages(*self.caches, s.cache, self.spec.isa).tobytes()

    def grow(self, request: int, count: int) -> np.ndarray:
        """The slots of a request's next tokens."""
        size, blocks = self.attention.cache.block_size, self.blocks[request]
        positions = np.arange(self.lengths[request], self.lengths[request] + count)
        self.lengths[request] += count
        while len(blocks) * size < self.lengths[request]:
            blocks.append(int(self.rng.choice(np.flatnonzero(self.owners == 0))))
            self.owners[blocks[-1]] = 1
        return np.array(blocks)[positions // size] * size + positions % size


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize(("block_size", "more"), [(16, {}), (16, {"window": 60}), (1, {"window": 45})])
@pytest.mark.parametrize("decode_tokens", [1, 3])
def test_every_step_is_right_whatever_came_before(isa, block_size, more, decode_tokens):
    layout = layout_of("f32", isa, block_size)
    attention = AttentionSpec.dense(4, 2, 64, "f32", block_size, 0.125, layout=layout, **more)
    server = Server(spec_of(attention, isa, decode_tokens), POLICY)
    for requests in REQUESTS:
        server.step(requests)
