"""Steps with random inputs for the GPU programs, run in Triton's interpreter and by the float64 definition.

Whatever no program may read or write is poisoned: NaN in slots that hold no key, in outputs and in states.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.kernels import reference
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step

TORCH = {"bf16": torch.bfloat16, "f16": torch.float16}
#: Relative error (Frobenius norm) of outputs rounded to a type; softmax weights are rounded to it too, and a quantized
#: cache is compared with what it stands for. A unit in the last place is 2**-8 and 2**-11.
MOST_ERROR = {"bf16": 2**-8, "f16": 2**-11}
#: Costs by which everything that can be shared is.
ALWAYS_SHARED = SharingCosts(
    most_rows=64,
    least_tokens=16,
    read_key=10.0,
    cached_key=((1, 10.0),),
    tile_key=0.0001,
    decode_rows=16,
    decode_row_key=0.0001,
    row=0.0,
    margin=1.0,
)


def attention(**facts) -> AttentionSpec:
    """A small layer; ``facts`` change it."""
    plain = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "dtype": "f16", "block_size": 16}
    plain |= {"scale": 0.125, "layout": "row"}
    return AttentionSpec.dense(**{**plain, **facts})


def variants(group: int, rows: int = 64, keys: int = 32) -> tuple[GpuVariant, ...]:
    """Tiles of 16 rows to decode (more where a group has more), of ``rows`` rows for everything else."""
    decode = max(16, 1 << (group - 1).bit_length())
    rows = max(rows, decode)
    return (
        GpuVariant("decode", max(1, decode // group), decode, keys, 4, 3),
        GpuVariant("prefill", rows // group, rows, keys, 8, 3),
    )


@dataclass
class Case:
    """Requests by their cached and new tokens; ``prefixes``: whose cache one begins with, and for how many blocks."""

    requests: list[tuple[int, int]]
    attention: AttentionSpec = field(default_factory=attention)
    prefixes: dict[int, tuple[int, int]] = field(default_factory=dict)
    sharing: SharingCosts | None = None
    split_keys: int = 1 << 20
    workers: int = 1
    variants: tuple[GpuVariant, ...] | None = None
    padding: int = 0
    """Tokens after the last request's, which belong to nobody."""

    def __post_init__(self):
        s = self.attention
        rng = np.random.default_rng()
        self.seed_state = rng.bit_generator.state  # of a failure, pytest shows it
        self.cached = np.array([cached for cached, _ in self.requests])
        self.new = np.array([new for _, new in self.requests])
        self.lengths = (self.cached + self.new).astype(np.int32)
        self.query_start = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        columns = -(-self.lengths // s.cache.block_size)
        blocks = int(columns.sum()) + 3
        order = rng.permutation(blocks).astype(np.int32)
        self.table = np.full((len(self.requests), int(columns.max()) + 1), blocks - 1, np.int32)
        first = np.cumsum(columns) - columns
        for request, count in enumerate(columns):
            self.table[request, :count] = order[first[request] : first[request] + count]
        for request, (other, count) in self.prefixes.items():
            self.table[request, :count] = self.table[other, :count]
        tokens = int(self.new.sum()) + self.padding
        normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape, np.float32)).to(TORCH[s.dtype])  # noqa: E731
        self.query = normal(tokens, s.num_heads, s.head_size)
        self.key = normal(tokens, s.num_kv_heads, s.head_size)
        self.value = normal(tokens, s.num_kv_heads, s.head_size)
        self.sinks = normal(s.num_heads) if s.sinks else None
        self.scales = torch.tensor([[0.25], [0.5]]) if s.cache.quantized else torch.ones(2, 1)
        self.slots = np.full(tokens, -1, np.int64)
        for request, (cached, new) in enumerate(self.requests):
            position = np.arange(cached, cached + new)
            block = self.table[request, position // s.cache.block_size].astype(np.int64)
            begin = self.query_start[request]
            self.slots[begin : begin + new] = block * s.cache.block_size + position % s.cache.block_size
        self.before = self._cache(blocks, rng)

    def _cache(self, blocks: int, rng: np.random.Generator) -> torch.Tensor:
        """Keys and values of the cached tokens, NaN in all other slots."""
        s = self.attention
        shape = (blocks, s.num_kv_heads, 2, s.cache.block_size, s.head_size)
        values = torch.from_numpy(rng.standard_normal(shape, np.float32))
        there = torch.zeros(blocks, s.cache.block_size, dtype=torch.bool)
        for request, cached in enumerate(self.cached):
            position = np.arange(cached)
            there[self.table[request, position // s.cache.block_size], position % s.cache.block_size] = True
        values = torch.where(there[:, None, None, :, None], values, torch.nan)
        return values.to(torch.float8_e4m3fn if s.cache.quantized else TORCH[s.dtype])

    @property
    def spec(self) -> KernelSpec:
        """The kernel that serves the step."""
        return KernelSpec(self.attention, "sm_90", self.variants or variants(self.attention.queries_per_kv))

    def run(self) -> Ran:
        """The step by the GPU programs."""
        decode = self.spec.variants[0]
        policy = StepPolicy(decode.max_tokens, self.split_keys, 2, self.sharing)
        tokens = int(self.new.sum())
        runner = GpuAttentionRunner(self.spec, policy, StepLimits(len(self.requests), tokens), torch.device("cpu"))
        runner._state_stats.fill_(torch.nan)
        runner._state_values.fill_(torch.nan)
        schedule = runner.begin_step(Step(self.query_start, self.lengths, self.table), self.workers)
        cache, output = self.before.clone(), torch.full_like(self.query, torch.nan)
        scales = {"key_scale": self.scales[0], "value_scale": self.scales[1]} if self.attention.cache.quantized else {}
        runner.attend(
            self.query,
            self.key,
            self.value,
            output,
            cache,
            torch.from_numpy(self.table),
            torch.from_numpy(self.slots),
            len(self.slots),
            **scales,
            sinks=self.sinks,
        )
        return Ran(output, cache, schedule)

    def expected_cache(self) -> torch.Tensor:
        """The cache after the new tokens are appended."""
        s, cache = self.attention, self.before.clone()
        for token, slot in enumerate(self.slots):
            if slot >= 0:
                block, offset = divmod(int(slot), s.cache.block_size)
                for half, new in enumerate((self.key, self.value)):
                    cache[block, :, half, offset] = (new[token].float() / self.scales[half]).to(cache.dtype)
        return cache

    def expected(self) -> np.ndarray:
        """The outputs in float64, of the tokens that belong to somebody."""
        cache = self.expected_cache().double() * self.scales.double().reshape(1, 1, 2, 1, 1)
        keys, values = cache[:, :, 0].numpy(), cache[:, :, 1].numpy()
        tokens = int(self.new.sum())
        query = self.query[:tokens].double().numpy()
        sinks = None if self.sinks is None else self.sinks.double().numpy()
        arguments = (query, keys, values, self.table, self.lengths, self.query_start, self.attention)
        with np.errstate(invalid="ignore"):
            return reference.attention(*arguments, sinks=sinks)

    def check(self, roundings: int = 1) -> Schedule:
        """Run, and hold against the definition; gives the work list for what a test wants to know of it.

        NaN is where the definition has it, and nowhere else. ``roundings``: weights are rounded before outputs are. Of
        many weights that evens out; where a few decide, it is a second rounding.
        """
        ran = self.run()
        tokens = int(self.new.sum())
        exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(ran.cache.float(), self.expected_cache().float(), **exactly)
        assert ran.output[tokens:].isnan().all()
        found, exact = ran.output[:tokens].double().numpy(), self.expected()
        np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
        known = ~np.isnan(exact)
        found, exact = found[known], exact[known]
        assert reference.relative_error(found, exact) < roundings * MOST_ERROR[self.attention.dtype]
        assert np.abs(found - exact).max() < 8 * MOST_ERROR[self.attention.dtype] * np.abs(exact).max()
        return ran.schedule


@dataclass
class Ran:
    """What a step gave."""

    output: torch.Tensor
    cache: torch.Tensor
    schedule: Schedule
