"""Checks llmir's kernels against float64: fresh inputs, an output of NaN, and NaN in every slot of the cache that
nobody may read. Appending is checked bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from llmir.ir.kernel_spec import SharingCosts, StepPolicy
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.step import Step
from on_gpu.checks import Check
from on_gpu.llmir_side import Planned, Plans
from on_gpu.step import DTYPES, exact_rows, from_pages, relative_error, to_pages
from on_gpu.timing import Budget, captured

#: The largest relative error that rounding to a type can cause: a result within it is as good as its type allows.
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11}
#: The same of the worst row of one head, whose weights are rounded before the second product as well.
ROW_FACTOR = 4
#: Scales of a quantized cache: powers of two, so that dividing by them is exact and bytes can be compared.
KEY_SCALE, VALUE_SCALE = 2.0**-6, 2.0**-5
_MOST_F8 = 448.0
_F8, _F8_NAN = torch.float8_e4m3fn, 0x7F
#: Rows behind the output, and tokens that are not kept, to see that nobody writes them.
_BEHIND = 2
#: Whatever may be shared is: the break-even is the compiler's affair, not the kernels'.
ALWAYS = SharingCosts(
    most_rows=1 << 20,
    least_tokens=1,
    read_key=1.0,
    cached_key=((1, 1.0),),
    tile_key=1e-6,
    decode_rows=1,
    decode_row_key=1.0,
    row=0.0,
    margin=1e9,
)
#: So many parts of every worker's share that checks' few requests are split.
_SPLIT_PARTS = 8


def eager(planned: Planned) -> StepPolicy:
    """The plan's policy, sharing whatever can be shared and splitting whatever is long."""
    chunk = max(variant.key_chunk for variant in planned.spec.variants)
    return replace(planned.policy, sharing=ALWAYS, split_keys=chunk, items_per_thread=_SPLIT_PARTS)


@dataclass
class Inputs:
    """A check's tensors. ``stored``: keys and values [2, slots, KV heads, head_size] as the cache holds them after the
    step, NaN where nothing is; ``before``: the same without the step's new tokens."""

    table: np.ndarray
    device_table: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    slots: torch.Tensor
    sinks: torch.Tensor | None
    stored: torch.Tensor
    before: torch.Tensor
    of_request: list[torch.Tensor]
    """Slots of each request's tokens."""

    @classmethod
    def random(cls, check: Check, block: int, device: torch.device, generator: torch.Generator) -> Inputs:
        """Normally distributed."""
        batch, shape, features = check.batch, check.batch.shape, check.features
        random = np.random.default_rng(int(torch.randint(1 << 31, (1,), generator=generator, device=device)))
        table, units = batch.placement(block, random)
        of_request = [
            torch.from_numpy(table[r, np.arange(n) // block].astype(np.int64) * block + np.arange(n) % block).to(device)
            for r, n in enumerate(batch.seq_lens)
        ]
        new = torch.cat([slots[len(slots) - n :] for slots, n in zip(of_request, batch.new, strict=True)])
        old = torch.cat([slots[: len(slots) - n] for slots, n in zip(of_request, batch.new, strict=True)])
        dtype = DTYPES[features.element_type]

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        tokens = normal(2, (units + 1) * block, shape.num_kv_heads, shape.head_size)
        # One tensor as a model's fused projection gives it: a token's queries, keys, values side by side.
        heads = shape.num_heads + 2 * shape.num_kv_heads
        fused = torch.full((batch.tokens + _BEHIND, heads, shape.head_size), torch.nan, dtype=dtype, device=device)
        query, key, value = fused.split([shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], 1)
        query[: batch.tokens] = normal(batch.tokens, shape.num_heads, shape.head_size)
        key[: batch.tokens], value[: batch.tokens] = tokens[0, new], tokens[1, new]
        kept = torch.cat([new, torch.full((_BEHIND,), -1, device=device)])
        stored, before = (cls._cache(tokens, slots, features.quantized) for slots in (torch.cat([old, new]), old))
        sinks = normal(shape.num_heads) if features.sinks else None
        device_table = torch.from_numpy(table).to(device)
        return cls(table, device_table, query, key, value, kept, sinks, stored, before, of_request)

    @staticmethod
    def _cache(tokens: torch.Tensor, slots: torch.Tensor, quantized: bool) -> torch.Tensor:
        """NaN, and ``tokens`` at ``slots``."""
        if not quantized:
            cache = torch.full_like(tokens, torch.nan)
            cache[:, slots] = tokens[:, slots]
            return cache
        scale = tokens.new_tensor([KEY_SCALE, VALUE_SCALE], dtype=torch.float32).view(2, 1, 1, 1)
        rounded = (tokens.float() / scale).clamp(-_MOST_F8, _MOST_F8).to(_F8).view(torch.uint8)
        cache = torch.full_like(rounded, _F8_NAN)
        cache[:, slots] = rounded[:, slots]
        return cache.view(_F8)

    def exact(self, check: Check, lengths: Sequence[int]) -> torch.Tensor:
        """The float64 output of the step, whose requests have so many tokens each."""
        batch, rows = check.batch, []
        scales = (KEY_SCALE, VALUE_SCALE) if check.features.quantized else (1.0, 1.0)
        for request, (length, new) in enumerate(zip(lengths, batch.new, strict=True)):
            begin = int(batch.query_start[request])
            slots = self.of_request[request][:length]
            keys, values = (
                bits(stored)[slots].view(stored.dtype).double() * scale
                for stored, scale in zip(self.stored, scales, strict=True)
            )
            positions = torch.arange(length - new, length, device=keys.device)
            query = self.query[begin : begin + new]
            rows.append(exact_rows(query, positions, keys, values, check.features, self.sinks))
        return torch.cat(rows)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of small floats as integers, to compare NaN with NaN, and because few operations know fp8."""
    return tensor.view(torch.uint8 if tensor.element_size() == 1 else torch.int16)


class Checker:
    """Runs checks; a kernel's programs are compiled once."""

    def __init__(self, plans: Plans, device: torch.device, generator: torch.Generator, limits: StepLimits):
        self._plans, self._device, self._generator, self._limits = plans, device, generator, limits
        self._runners: dict[Any, GpuAttentionRunner] = {}
        self._scales = [torch.tensor([scale], device=device) for scale in (KEY_SCALE, VALUE_SCALE)]

    def run(self, check: Check) -> dict[str, Any]:
        """The row of a check; its "problems" are empty where all is as it must be."""
        planned, runner = self._runner(check)
        block = planned.spec.attention.cache.block_size
        inputs = Inputs.random(check, block, self._device, self._generator)
        batch = check.batch
        pages = self._pages(inputs, block)
        output = torch.full_like(inputs.query, torch.nan).contiguous()
        schedule = runner.begin_step(Step(batch.query_start, batch.seq_lens, inputs.table))
        self._attend(runner, check, inputs, pages, output, batch.tokens + _BEHIND)
        problems = []
        if not torch.equal(torch.stack(from_pages(bits(pages))), bits(inputs.stored)):
            problems.append("the cache is not what it must be after appending")
        if not output[batch.tokens :].isnan().all():
            problems.append("rows behind the output were written")
        if check.splits and not (schedule.merges.count or schedule.shared_requests):
            problems.append("nothing was split, which was to be checked")
        if check.shares and not schedule.shared_requests:
            problems.append("nothing was shared, which was to be checked")
        row = self._compared(check, output[: batch.tokens], inputs.exact(check, batch.seq_lens.tolist()), problems)
        counts = {"items": len(schedule.items), "merged_tokens": schedule.merges.count}
        return row | counts | {"shared_requests": schedule.shared_requests, "plan": planned.source}

    def run_captured(self, check: Check) -> dict[str, Any]:
        """A decode step captured as a CUDA graph, replayed for a step whose requests are shorter."""
        planned, runner = self._runner(check)
        block = planned.spec.attention.cache.block_size
        inputs = Inputs.random(check, block, self._device, self._generator)
        batch = check.batch
        inputs.before, inputs.slots = inputs.stored, torch.full_like(inputs.slots, -1)
        pages = self._pages(inputs, block)
        output = torch.full_like(inputs.query, torch.nan).contiguous()
        runner.begin_step(Step(batch.query_start, batch.seq_lens, inputs.table))
        replay = captured(lambda: self._attend(runner, check, inputs, pages, output, batch.tokens))
        lengths = np.maximum(batch.seq_lens - 1 - np.arange(batch.requests, dtype=np.int32), 1).astype(np.int32)
        runner.begin_step(Step(batch.query_start, lengths, inputs.table))
        output.fill_(torch.nan)
        replay()
        named = replace(check, batch=replace(batch, name=f"CUDA graph, {batch.name}"))
        return self._compared(named, output[: batch.tokens], inputs.exact(check, lengths.tolist()), [])

    def _runner(self, check: Check) -> tuple[Planned, GpuAttentionRunner]:
        planned = self._plans.kernel(check.batch.shape, check.features)
        planned = replace(planned, policy=eager(planned))
        if planned.spec not in self._runners:
            runner = GpuAttentionRunner.load(planned.as_kernel(), self._limits, self._device)
            self._runners[planned.spec] = runner
        return planned, self._runners[planned.spec]

    def _pages(self, inputs: Inputs, block: int) -> torch.Tensor:
        _, slots, kv_heads, size = inputs.before.shape
        pages = torch.empty((slots // block, kv_heads, 2, block, size), dtype=inputs.before.dtype, device=self._device)
        keys, values = bits(inputs.before)
        to_pages(keys, values, block, bits(pages))
        return pages

    def _attend(
        self,
        runner: GpuAttentionRunner,
        check: Check,
        inputs: Inputs,
        pages: torch.Tensor,
        output: torch.Tensor,
        append_tokens: int,
    ) -> None:
        tokens = check.batch.tokens
        key_scale, value_scale = self._scales if check.features.quantized else (None, None)
        runner.attend(
            inputs.query[:tokens],
            inputs.key,
            inputs.value,
            output[:tokens],
            pages,
            inputs.device_table,
            inputs.slots,
            append_tokens,
            key_scale=key_scale,
            value_scale=value_scale,
            sinks=inputs.sinks,
        )

    def _compared(self, check: Check, output: torch.Tensor, exact: torch.Tensor, problems: list[str]) -> dict[str, Any]:
        error, worst = relative_error(output, exact)
        bound = ROUNDING[check.features.element_type]
        if not (error <= bound and worst <= ROW_FACTOR * bound):  # NaN is wrong too
            problems = [*problems, f"relative error {error:.1e}, worst row {worst:.1e}, with {bound:.1e} allowed"]
        return {
            "check": check.name,
            "batch": check.batch.name,
            "shape": str(check.batch.shape),
            **asdict(check.features),
            "relative_error": error,
            "worst_row": worst,
            "bound": bound,
            "problems": problems,
        }


def run_checks(
    checks: Sequence[Check], plans: Plans, device: torch.device, generator: torch.Generator, budget: Budget
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the checks, and those that ``budget`` left no time for; an error is a problem of its check alone."""
    if not checks:
        return [], []
    limits = StepLimits(max(c.batch.requests for c in checks), max(c.batch.tokens for c in checks))
    checker = Checker(plans, device, generator, limits)
    rows, left_out = [], []
    for check in checks:
        if budget.left < 0:
            left_out.append(check.name)
            continue
        runs = [checker.run]
        if device.type == "cuda" and check.batch.decodes:
            runs.append(checker.run_captured)
        for run in runs:
            try:
                rows.append(run(check))
            except Exception as error:  # the others are to be heard of too
                rows.append({"check": check.name, "problems": [f"{type(error).__name__}: {error}"]})
    return rows, left_out
