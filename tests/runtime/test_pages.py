"""Rows of a cache, seen slot by slot, against what the kernels append."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from compiled_kernels import RUNNABLE_ISAS, loaded
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.dtypes import DTYPES
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.pages import key_and_value_rows
from llmir.runtime.step import Step
from llmir.targets.x86 import tiles

#: Bit patterns: rows are moved, never computed with.
STORED = {2: torch.int16, 4: torch.int32}
NUM_BLOCKS = 9


@cache
def spec_of(isa: str, element_type: str, block_size: int, head_size: int) -> KernelSpec:
    layout = tiles.layout(isa, element_type, block_size)
    s = AttentionSpec.dense(4, 2, head_size, element_type, block_size, head_size**-0.5, layout=layout)
    return KernelSpec(s, isa, (tiles.decode_variant(s, isa), tiles.prefill_variant(s, isa)))


specs = st.builds(
    spec_of,
    st.sampled_from(RUNNABLE_ISAS),
    st.sampled_from(["bf16", "f16", "f32"]),
    st.sampled_from([1, 3, 8, 16, 24, 32, 64, 128]),
    st.sampled_from([64, 80]),
)


class Cache:
    """A cache of random bits, and new rows for some of its slots in any order."""

    def __init__(self, spec: KernelSpec, seed: int):
        s, rng = spec.attention, np.random.default_rng(seed)
        self.spec, self.stored = spec, STORED[DTYPES[s.dtype].bits // 8]
        self.pages = self._bits(rng, NUM_BLOCKS, s.num_kv_heads, 2, s.cache.block_size * s.head_size)
        self.count = int(rng.integers(1, NUM_BLOCKS * s.cache.block_size))
        self.slots = torch.from_numpy(rng.permutation(NUM_BLOCKS * s.cache.block_size)[: self.count])
        self.key, self.value = (self._bits(rng, self.count, s.num_kv_heads, s.head_size) for _ in range(2))

    def _bits(self, rng: np.random.Generator, *shape: int) -> torch.Tensor:
        # Small ones: as floating point they are finite, as the kernel that has to attend to them would like.
        return torch.from_numpy(rng.integers(0, 1 << 10, shape)).to(self.stored)

    def appended_by_the_kernel(self) -> torch.Tensor:
        """The pages after the kernel has put the rows into their slots."""
        s, pages = self.spec.attention, self.pages.clone()
        runner = CpuAttentionRunner(loaded(self.spec), StepPolicy(1, 1 << 20, 1))
        query = torch.zeros(self.count, s.num_heads, s.head_size, dtype=self.stored)
        output = torch.empty_like(query)
        table = np.zeros((1, self.count), np.int32)  # it attends to whatever is there
        lengths = np.array([self.count], np.int32)
        runner.begin_step(Step(np.array([0, self.count], np.int32), lengths, table), 1)
        tensors = [(t.data_ptr(), t.stride(0)) for t in (query, self.key, self.value, output)]
        runner.attend(*tensors, pages.data_ptr(), self.slots.data_ptr(), self.count)
        return pages


@settings(max_examples=60)
@given(spec=specs, seed=st.integers(0, 2**32 - 1))
def test_rows_are_where_the_kernel_puts_them(spec: KernelSpec, seed: int) -> None:
    case = Cache(spec, seed)
    appended = case.appended_by_the_kernel()
    keys, values = key_and_value_rows(appended, spec.attention.cache, spec.isa)
    assert torch.equal(keys.read(case.slots), case.key)
    assert torch.equal(values.read(case.slots), case.value)
    written = case.pages.clone()
    keys, values = key_and_value_rows(written, spec.attention.cache, spec.isa)
    keys.write(case.slots, case.key)
    values.write(case.slots, case.value)
    assert torch.equal(written, appended), "other slots are as they were, too"


@pytest.mark.parametrize("isa", RUNNABLE_ISAS)
@pytest.mark.parametrize("block_size", [1, 16, 128])
def test_every_element_of_a_page_is_in_one_row(isa: str, block_size: int) -> None:
    spec = spec_of(isa, "bf16", block_size, 64)
    s = spec.attention
    shape = (NUM_BLOCKS, s.num_kv_heads, 2, block_size * s.head_size)
    pages = torch.arange(int(np.prod(shape)), dtype=torch.int32).view(shape)
    slots = torch.arange(NUM_BLOCKS * block_size)
    keys, values = key_and_value_rows(pages, s.cache, isa)
    assert torch.equal(keys.read(slots).flatten().sort().values, pages[:, :, 0].flatten().sort().values)
    assert torch.equal(values.read(slots).flatten().sort().values, pages[:, :, 1].flatten().sort().values)


def test_a_block_has_as_many_slots_as_tokens() -> None:
    spec = spec_of(RUNNABLE_ISAS[0], "bf16", 24, 64)
    pages = torch.zeros(2, 2, 2, 24 * 64, dtype=torch.int16)
    assert [rows.block_size for rows in key_and_value_rows(pages, spec.attention.cache, spec.isa)] == [24, 24]
