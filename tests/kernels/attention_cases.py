"""Random attention steps, run by a compiled kernel and by the reference.

Everything a kernel must not read or write is NaN: blocks of nobody, slots not yet written, output columns
between tokens. Entries of a block table that it must not follow lead out of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from compiled_kernels import RUNNABLE_ISAS, loaded
from hypothesis import strategies as st

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import CpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.kernels import reference
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.step import Step
from llmir.targets.registry import lanes_of
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: Head sizes of keys and values: those that models have most, the extremes, and some that are no multiple of 16.
HEAD_SIZES = (
    *((64, 64), (128, 128), (32, 32), (40, 40), (80, 80)),
    *((96, 96), (112, 112), (192, 128), (256, 256), (576, 512)),
)
#: Like avx512, made of what avx2 has: two narrow vectors for each of its own. See :func:`emulate_wide`.
WIDE = "wide"
#: Largest error of one output row, relative to the row. bf16 and f16 round the output and the probabilities to
#: 8 and 11 bits; float32 is as good as its exponential.
ROW_ERROR = {"bf16": 8e-3, "f16": 1e-3, "f32": 1e-5}
#: Below these numbers lose digits.
LEAST_NORMAL = {"bf16": 2.0**-126, "f16": 2.0**-14, "f32": 2.0**-126}
#: What float32 scores add to it: scores grow with the queries, and a weight's relative error is its score's
#: absolute one.
SCORE_ERROR = 2e-6


@dataclass(frozen=True)
class Batch:
    """One step: of each request the tokens in the cache and the new ones."""

    cached: tuple[int, ...]
    new: tuple[int, ...]
    threads: int = 1
    appends: bool = True
    """Whether the kernel appends the new tokens; else they are in the cache already."""
    sharpness: float = 1.0
    """Factor on the queries: 0 makes all weights equal, a large one leaves one key a row."""
    seed: int = 0
    prefixes: tuple[tuple[int, int], ...] = ()
    """Of each request, an earlier one and how many of its tokens it begins with; as many whole blocks as both have in
    the cache are the same blocks. Empty: nobody shares."""


def emulate_wide(monkeypatch) -> None:
    """Lets a test compile for :data:`WIDE`."""
    made = replace(INSTRUCTION_SETS["avx512"], name=WIDE, features=INSTRUCTION_SETS["avx2"].features, scales=False)
    monkeypatch.setitem(INSTRUCTION_SETS, WIDE, made)


def bidirectional(attention: AttentionSpec) -> AttentionSpec:
    """The same, where a query sees later tokens of its request too."""
    return replace(attention, mask=replace(attention.mask, causal=False))


def layout_of(element_type: str, isa: str, block_size: int) -> str:
    if block_size % lanes_of(isa):
        return "row"
    return "pair" if element_type == "bf16" else "lane"


def spec_of(attention: AttentionSpec, isa: str, decode_tokens: int = 1, prefill_tokens: int = 16) -> KernelSpec:
    """A spec with small tiles that any attention allows."""
    lanes = lanes_of(isa)
    return KernelSpec(
        attention,
        isa,
        (
            CpuVariant("decode", decode_tokens, 2, 32, 32 // lanes, 2, 16),
            CpuVariant("prefill", prefill_tokens, 3, 32, 2, 4, 0),
        ),
    )


@st.composite
def variants(draw, name: str, max_tokens: int, attention: AttentionSpec, isa: str) -> CpuVariant:
    lanes, group, rows, block = (
        lanes_of(isa),
        attention.cache.key_group(lanes_of(isa)),
        attention.cache.layout == "row",
        attention.cache.block_size,
    )

    def fits(keys: int) -> bool:
        return keys % group == 0 and (rows or block % keys == 0 or keys % block == 0)

    chunk = draw(st.sampled_from([c for c in (8, 16, 24, 32, 48, 64, 96, 128, 160, 192) if fits(c)]))
    vectors = draw(st.sampled_from([v for v in (1, 2, 3, 4) if chunk % (v * lanes) == 0 and fits(v * lanes)]))
    return CpuVariant(
        name,
        max_tokens=draw(st.integers(1, max_tokens)),
        row_tile=draw(st.integers(1, 6)),
        key_chunk=chunk,
        key_vectors=vectors,
        value_vectors=draw(st.integers(1, 8)),
        prefetch=draw(st.sampled_from([0, 2, 16, 64])),
    )


@st.composite
def specs(draw) -> KernelSpec:
    """Any kernel this machine can run."""
    isa, element_type = draw(st.sampled_from(RUNNABLE_ISAS)), draw(st.sampled_from(["bf16", "f16", "f32"]))
    kv_heads, (head_size, value_size) = draw(st.integers(1, 3)), draw(st.sampled_from(HEAD_SIZES))
    block_size = draw(st.sampled_from([1, 2, 3, 8, 16, 24, 32, 48, 64, 128, 160]))
    attention = AttentionSpec.dense(
        num_heads=kv_heads * draw(st.integers(1, 8)),
        num_kv_heads=kv_heads,
        head_size=head_size,
        value_size=value_size,
        dtype=element_type,
        block_size=block_size,
        scale=head_size**-0.5 * draw(st.sampled_from([1.0, 0.5])),
        window=draw(st.sampled_from([0, 0, 1, 7, 64, 100])),
        soft_cap=draw(st.sampled_from([0.0, 0.0, 2.0, 30.0])),
        sinks=draw(st.sampled_from([False, False, True])),
        alibi=draw(st.sampled_from([False, False, True])),
        layout=draw(st.sampled_from([layout_of(element_type, isa, block_size), "row"])),
    )
    if not attention.alibi and draw(st.sampled_from([False, False, True])):
        attention = bidirectional(attention)
    tiles = [draw(variants(name, tokens, attention, isa)) for name, tokens in (("decode", 3), ("prefill", 40))]
    return KernelSpec(attention, isa, tuple(tiles))


@st.composite
def batches(draw) -> Batch:
    requests = draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 70)), min_size=1, max_size=4))
    decodes = draw(st.lists(st.tuples(st.integers(0, 500), st.just(1)), max_size=3))
    alike = draw(st.lists(st.tuples(st.integers(200, 300), st.sampled_from([1, 1, 2])), max_size=5))
    mixed = draw(st.permutations([*requests, *decodes, *alike]))
    if not any(new for _, new in mixed):
        mixed = [*mixed, (0, 1)]
    return Batch(
        tuple(cached for cached, _ in mixed),
        tuple(new for _, new in mixed),
        threads=draw(st.sampled_from([1, 2])),
        appends=draw(st.booleans()),
        sharpness=draw(st.sampled_from([0.0, 1.0, 20.0])),
        seed=draw(st.integers(0, 2**32 - 1)),
        prefixes=draw(
            st.one_of(
                st.just(()),
                st.tuples(*(st.tuples(st.integers(0, request), st.integers(0, 400)) for request in range(len(mixed)))),
            )
        ),
    )


#: What decides nothing by its cost: everything of ``least_tokens`` and more is shared.
SHARED = SharingCosts(
    most_rows=1000,
    least_tokens=1,
    read_key=2.0,
    cached_key=((1, 1.0),),
    tile_key=1.0,
    decode_rows=1000,
    decode_row_key=1.0,
    row=1.0,
    margin=1e9,
)

policies = st.builds(
    StepPolicy,
    decode_tokens=st.integers(1, 3),
    split_keys=st.sampled_from([16, 64, 1000]),
    items_per_thread=st.sampled_from([1, 4, 50]),
    sharing=st.one_of(
        st.none(),
        st.builds(
            partial(replace, SHARED),
            most_rows=st.sampled_from([1, 8, 1000]),
            least_tokens=st.sampled_from([1, 64]),
            row=st.sampled_from([0.0, 100.0]),
            margin=st.sampled_from([0.9, 1e9]),
        ),
    ),
)


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy that begins on a cache line, as every framework's cache does."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


class Inputs:
    """The arrays of one batch: ``qkv`` holds queries, keys and values side by side, as a model's projection does."""

    def __init__(self, attention: AttentionSpec, batch: Batch):
        s, rng = attention, np.random.default_rng(batch.seed)
        self.attention, self.batch = attention, batch
        self.query_start = np.concatenate([[0], np.cumsum(batch.new)]).astype(np.int32)
        self.seq_lens = np.array(batch.cached, np.int32) + np.array(batch.new, np.int32)
        self.tokens, self.padding = int(self.query_start[-1]), int(rng.integers(0, 3))
        self._place_blocks(rng)
        self._fill_cache(rng)
        self._make_tokens(rng)
        self.sinks = rng.standard_normal(s.num_heads).astype(np.float32) * 4 if s.sinks else None
        self.slopes = 2.0 ** -np.arange(1, s.num_heads + 1, dtype=np.float32) if s.alibi else None
        self.expected_caches = [cache.copy() for cache in self.caches]
        reference.append_kv(self.key, self.value, self.slots, *self.expected_caches)

    def _make_tokens(self, rng: np.random.Generator) -> None:
        s, rows = self.attention, self.tokens + self.padding
        heads, kv_heads = s.num_heads, s.num_kv_heads
        sizes = np.cumsum([heads * s.head_size, kv_heads * s.head_size, kv_heads * s.value_size])
        self.qkv = self._encode(rng.standard_normal((rows, sizes[-1] + s.head_size)))
        self.qkv[:, : sizes[0]] = self._encode(self.batch.sharpness * rng.standard_normal((rows, sizes[0])))
        query, key, value, _ = np.split(self.qkv, sizes, axis=1)
        self.query, self.key = query.reshape(rows, heads, -1), key.reshape(rows, kv_heads, -1)
        self.value = value.reshape(rows, kv_heads, -1)
        self.output = self._encode(np.full((rows, heads + 1, s.value_size), np.nan))

    def head_numbers(self) -> dict[str, int]:
        """What CpuAttentionRunner.attend takes of a layer's own: addresses, which this keeps alive."""
        given = {"sinks": self.sinks, "slopes": self.slopes}
        return {name: 0 if numbers is None else numbers.ctypes.data for name, numbers in given.items()}

    def permuted(self, order: Sequence[int]) -> Inputs:
        """The same step with its requests in another order."""
        other = copy(self)
        tokens = np.concatenate([np.arange(self.query_start[i], self.query_start[i + 1]) for i in order])
        other.query_start = np.concatenate([[0], np.cumsum([self.batch.new[i] for i in order])]).astype(np.int32)
        other.seq_lens, other.block_table = self.seq_lens[list(order)], self.block_table[list(order)]
        other.query, other.key, other.value = self.query[tokens], self.key[tokens], self.value[tokens]
        other.slots = self.slots[tokens]
        return other

    def _encode(self, values: np.ndarray) -> np.ndarray:
        return reference.encode(values.astype(np.float32), self.attention.dtype)

    def _place_blocks(self, rng: np.random.Generator) -> None:
        """A block table whose unused entries name no block; the slots of the new tokens.

        Unused are entries past the end of a request, and before its window.
        """
        size = self.attention.cache.block_size
        needed = [-(-int(n) // size) for n in self.seq_lens]
        self.num_blocks = sum(needed) + 3
        free = iter(rng.permutation(np.arange(1, self.num_blocks)))
        self.block_table = np.zeros((len(needed), max(needed) + 1), np.int32)
        for request, count in enumerate(needed):
            self.block_table[request, :count] = [next(free) for _ in range(count)]
        cached = self.batch.cached
        for request, (other, tokens) in enumerate(self.batch.prefixes):
            shared = min(tokens, cached[request], cached[other]) // size
            self.block_table[request, :shared] = self.block_table[other, :shared]
        self.slots = rng.integers(-3 * size, 0, self.tokens + self.padding)
        for request, count in enumerate(needed):
            positions = np.arange(self.batch.cached[request], self.seq_lens[request])
            blocks = self.block_table[request, positions // size].astype(np.int64)
            rows = slice(self.query_start[request], self.query_start[request + 1])
            self.slots[rows] = blocks * size + positions % size
            unused = np.ones(self.block_table.shape[1], bool)
            unused[self._first_cached(request) // size : count] = False
            self.block_table[request, unused] = rng.choice([-(2**31), 2**31 - 1], unused.sum())

    def _first_cached(self, request: int) -> int:
        """The first token that a new one may see."""
        window = self.attention.mask.window
        return max(0, self.batch.cached[request] - window + 1) if window else 0

    def _fill_cache(self, rng: np.random.Generator) -> None:
        """Cached tokens in their slots; blocks that the window has left behind are NaN like everything else."""
        s = self.attention
        shape = (self.num_blocks, s.num_kv_heads, s.cache.block_size)
        sizes = (s.head_size, s.value_size)
        self.caches = [self._encode(np.full((*shape, size), np.nan)) for size in sizes]
        for request, cached in enumerate(self.batch.cached):
            positions = np.arange(self._first_cached(request) // s.cache.block_size * s.cache.block_size, cached)
            blocks = self.block_table[request, positions // s.cache.block_size]
            for logical, size in zip(self.caches, sizes, strict=True):
                values = self._encode(rng.standard_normal((len(positions), s.num_kv_heads, size)))
                logical[blocks, :, positions % s.cache.block_size] = values


def expected(inputs: Inputs) -> np.ndarray:
    """What the reference says of a step: float64 [tokens, heads, head_size]."""
    query, caches, table = inputs.query[: inputs.tokens], inputs.expected_caches, inputs.block_table
    with np.errstate(invalid="ignore"):
        return reference.attention(
            query, *caches, table, inputs.seq_lens, inputs.query_start, inputs.attention, inputs.sinks, inputs.slopes
        )


def address(array: np.ndarray) -> tuple[int, int]:
    """Address and elements from one token to the next."""
    return array.ctypes.data, array.strides[0] // array.itemsize


def begin_step(runner: CpuAttentionRunner, step: Step, threads: int) -> None:
    """Begins a step that finds NaN in all states, and room for each that it leaves."""
    merges = runner.begin_step(step, threads).merges
    buffers, arguments = {name: buffer for name, (buffer, _) in runner._buffers.items()}, runner._arguments
    room = {"states": merges.state_rows * runner._state_bytes}
    room["merge_counters"] = merges.count * 4 * runner.spec.attention.num_kv_heads
    for name, needed in room.items():
        if needed:
            begin = getattr(arguments, name) - buffers[name].ctypes.data
            assert 0 <= begin <= len(buffers[name]) - needed, f"{needed} bytes of {name}"
    if "states" in buffers:
        buffers["states"].fill(0xFF)


def attend(spec: KernelSpec, inputs: Inputs, policy: StepPolicy) -> np.ndarray:
    """What a step of new tokens that are in the cache gives: float32 [tokens, heads, head_size]."""
    pages = aligned(reference.pack_pages(*inputs.expected_caches, spec.attention.cache, spec.isa))
    runner, output = CpuAttentionRunner(loaded(spec), policy), inputs.output[: inputs.tokens].copy()
    begin_step(runner, Step(inputs.query_start, inputs.seq_lens, inputs.block_table), inputs.batch.threads)
    runner.attend(
        address(inputs.query), (0, 0), (0, 0), address(output), pages.ctypes.data, 0, 0, **inputs.head_numbers()
    )
    return reference.decode(output[:, : spec.attention.num_heads])


def check(spec: KernelSpec, batch: Batch, policy: StepPolicy, runner: CpuAttentionRunner | None = None) -> float:
    """Run ``batch`` twice; outputs, the cache, and all that must stay untouched are as the reference says.

    ``runner`` is one that may have run other steps, of the same kernel by the same policy; without it, a new one.
    Returns the relative error over all outputs.
    """
    s, inputs = spec.attention, Inputs(spec.attention, batch)
    before = inputs.caches if batch.appends else inputs.expected_caches
    pages = aligned(reference.pack_pages(*before, s.cache, spec.isa))
    runner = runner or CpuAttentionRunner(loaded(spec), policy)
    outputs = [inputs.output.copy(), inputs.output.copy()]
    table = inputs.block_table
    begin_step(runner, Step(inputs.query_start, inputs.seq_lens, table), batch.threads)
    for output in outputs:
        runner.attend(
            address(inputs.query),
            address(inputs.key),
            address(inputs.value),
            address(output),
            pages.ctypes.data,
            inputs.slots.ctypes.data,
            len(inputs.slots) if batch.appends else 0,
            **inputs.head_numbers(),
        )
    expected_pages = reference.pack_pages(*inputs.expected_caches, s.cache, spec.isa)
    assert pages.tobytes() == expected_pages.tobytes(), "cache"
    assert outputs[0].tobytes() == outputs[1].tobytes(), "second call"
    written = outputs[0][: inputs.tokens, : s.num_heads]
    untouched = [outputs[0][:, s.num_heads :], outputs[0][inputs.tokens :]]
    assert all(np.isnan(reference.decode(part)).all() for part in untouched), "untouched output"
    exact = expected(inputs)
    assert row_error(written, exact, LEAST_NORMAL[s.dtype]) < ROW_ERROR[s.dtype] + SCORE_ERROR * batch.sharpness
    return reference.relative_error(written, exact)


def row_error(output: np.ndarray, exact: np.ndarray, least: float = 0.0) -> float:
    """The largest relative error of one query head's output; infinite where an output is not a number.

    Numbers smaller than ``least`` count as so large: a sink may leave next to no weight.
    """
    difference = np.linalg.norm(reference.decode(output) - exact, axis=-1)
    error = difference / np.maximum(np.linalg.norm(exact, axis=-1), least * exact.shape[-1] ** 0.5)
    return float(np.nan_to_num(error, nan=np.inf).max())
