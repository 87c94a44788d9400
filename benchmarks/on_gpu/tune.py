"""Times tile sizes: which variants, ways of cutting work lists and block sizes are fastest on this GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import torch

from llmir.errors import LlmirError
from llmir.ir.kernel_spec import GpuVariant, StepPolicy
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from on_gpu.batches import LLAMA, QWEN, TINY, Batch, decode, prefill, shared
from on_gpu.compile import compile_all
from on_gpu.llmir_side import LlmirSide, Planned, Plans, power_of_two
from on_gpu.speed import FULL, MOST_CALLS_IN_GRAPH, ROTATED_BYTES, WRONG
from on_gpu.speed import TINY as TINY_EFFORT
from on_gpu.step import GRAIN, TINY_GRAIN, Arena, Step
from on_gpu.timing import Budget, Rounds, captured, clock_for, interleaved, spread

K = 1024
ROUNDS = Rounds(11, 11, 2)
#: Candidates, the likeliest first, so that a short run has seen them.
DECODE_KEYS, DECODE_WARPS, DECODE_STAGES = (64, 32, 128), (4, 2, 8), (3, 2, 4, 5)
PREFILL_ROWS, PREFILL_KEYS, PREFILL_WARPS, PREFILL_STAGES = (128, 64), (64, 128, 32), (8, 4), (2, 3, 4)
PARTS, SPLIT_KEYS = (2, 1, 4, 8), (256, 128, 512, 1024)
BLOCK_SIZES = (16, 32, 64, 128)
#: Least rows of a tile that matrix units take.
LEAST_ROWS = 16

VariantName = Literal["decode", "prefill"]


@dataclass(frozen=True)
class Question:
    """A batch, and the variant that does its work."""

    batch: Batch
    variant: VariantName


def questions(tiny: bool) -> Iterator[Question]:
    """What is asked, in order."""
    if tiny:
        yield Question(Batch("decode 2 x 40", TINY, (1, 1), (40, 40)), "decode")
        return
    for shape in (LLAMA, QWEN):
        yield Question(decode(shape, 64, 4 * K), "decode")
        yield Question(prefill(shape, 8 * K), "prefill")
    yield Question(shared("8 of 16k", ((8, 16 * K),)), "prefill")
    yield Question(decode(LLAMA, 4, 32 * K), "decode")


def candidates(question: Question, tiny: bool) -> Iterator[GpuVariant]:
    """Variants to try."""
    shape = question.batch.shape
    group = shape.num_heads // shape.num_kv_heads
    if question.variant == "decode":
        rows = max(LEAST_ROWS, power_of_two(group))
        combinations = [(rows, *rest) for rest in product(DECODE_KEYS, DECODE_WARPS, DECODE_STAGES)]
    else:
        combinations = list(product(PREFILL_ROWS, PREFILL_KEYS, PREFILL_WARPS, PREFILL_STAGES))
    for rows, keys, warps, stages in combinations[: 2 if tiny else None]:
        yield GpuVariant(question.variant, max(1, rows // group), rows, keys, warps, stages)


class Tuner:
    """Runs variants of one kernel on one batch."""

    def __init__(self, plans: Plans, device: torch.device, generator: torch.Generator, tiny: bool):
        self._plans, self._device, self._generator, self._tiny = plans, device, generator, tiny
        self._rounds = TINY_EFFORT.rounds if tiny else ROUNDS
        self._effort = TINY_EFFORT if tiny else FULL
        self._arena = Arena(1 << 22 if tiny else 3 * ROTATED_BYTES, "bf16", device, generator)

    def ask(self, question: Question, budget: Budget) -> dict[str, Any]:
        """Every candidate's time, fastest first; with the fastest, ways of cutting the work list, and block sizes."""
        planned = self._plans.kernel(question.batch.shape)
        step = self._step(question.batch, planned)
        kernels = [(variant, with_variant(planned, variant)) for variant in candidates(question, self._tiny)]
        if self._device.type == "cuda":
            compile_all(kernel.spec for _, kernel in kernels)
        rows = []
        for variant, kernel in kernels:
            if budget.left < 0:
                break
            rows.append(self._row(step, kernel) | {"variant": asdict(variant)})
        done = sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
        answer: dict[str, Any] = {
            "case": question.batch.name,
            "shape": str(question.batch.shape),
            "tried": question.variant,
            "planned": self._row(step, planned) | {"variant": asdict(planned.spec.variant(question.variant))},
            "rows": done + [row for row in rows if "seconds" not in row],
        }
        if done:
            best = with_variant(planned, GpuVariant(**done[0]["variant"]))
            answer["policies"] = self._policies(step, best, budget)
            answer["block_sizes"] = self._block_sizes(step, best, budget)
        return answer

    def _block_sizes(self, step: Step, planned: Planned, budget: Budget) -> list[dict[str, Any]]:
        rows = []
        for size in BLOCK_SIZES:
            if budget.left < 0 or step.grain % size:
                break
            attention = planned.spec.attention.with_cache(block_size=size)
            rows.append(
                self._row(step, replace(planned, spec=replace(planned.spec, attention=attention)))
                | {"block_size": size}
            )
        return sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])

    def _policies(self, step: Step, planned: Planned, budget: Budget) -> list[dict[str, Any]]:
        rows = []
        for parts, keys in list(product(PARTS, SPLIT_KEYS))[: 2 if self._tiny else None]:
            if budget.left < 0:
                break
            policy: StepPolicy = replace(planned.policy, items_per_thread=parts, split_keys=keys)
            named = {"items_per_thread": parts, "split_keys": keys}
            rows.append(self._row(step, replace(planned, policy=policy)) | named)
        return sorted((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])

    def _step(self, batch: Batch, planned: Planned) -> Step:
        grain = max(TINY_GRAIN if self._tiny else GRAIN, planned.spec.attention.cache.block_size)
        units = sum(-(-own // grain) for own in batch.own) + sum(g * n // grain for g, n in batch.shared)
        size, room = units * grain * batch.shape.token_bytes, self._arena.tokens.numel() * 2
        layers = max(1, min(-(-ROTATED_BYTES // size), room // size, self._effort.most_layers))
        return Step(batch, self._arena, layers, grain, self._generator)

    def _row(self, step: Step, planned: Planned) -> dict[str, Any]:
        """The time of a call, or why there is none."""
        limits = StepLimits(step.batch.requests, step.batch.tokens)
        try:
            runner = GpuAttentionRunner.load(planned.as_kernel(), limits, self._device)
            side = LlmirSide("llmir", planned, step, runner, step.pages(planned.spec.attention.cache.block_size))
            side.prepare()
            side.run(0)
            error, _ = step.errors(side.output)
            if not error < WRONG:
                return {"problem": f"relative error {error:.1e}"}
            return {"relative_error": error, **self._timed(side, step)}
        except (LlmirError, RuntimeError) as problem:  # too much shared memory, no such tile: an answer too
            return {"problem": " ".join(str(problem).split())[:200]}

    def _timed(self, side: LlmirSide, step: Step) -> dict[str, Any]:
        calls = max(self._effort.least_calls, min(step.layers, MOST_CALLS_IN_GRAPH))

        def run() -> None:
            for n in range(calls):
                side.run(n % step.layers)

        in_graph = self._device.type == "cuda" and step.batch.decodes
        timed, launches = (captured(run), 1) if in_graph else (run, calls)
        times = interleaved({"llmir": timed}, clock_for(self._device), 0, self._rounds, launches)
        return spread(times["llmir"], calls)


def with_variant(planned: Planned, variant: GpuVariant) -> Planned:
    """The kernel with one of its variants replaced."""
    variants = tuple(variant if v.name == variant.name else v for v in planned.spec.gpu_variants)
    return replace(planned, spec=replace(planned.spec, variants=variants))


def tune(
    plans: Plans, device: torch.device, generator: torch.Generator, budget: Budget, tiny: bool
) -> list[dict[str, Any]]:
    """Answers all questions that there is time for, and prints them."""
    asked, answers = list(questions(tiny)), []
    tuner = Tuner(plans, device, generator, tiny)
    for number, question in enumerate(asked):
        if budget.left < 0:
            print(f"no time was left for {question.batch.name} {question.batch.shape}")
            continue
        answers.append(tuner.ask(question, Budget(budget.left / (len(asked) - number))))
        print_answer(answers[-1])
    return answers


#: Lines of an answer that are printed.
_SHOWN = 6


def print_answer(answer: dict[str, Any]) -> None:
    """The fastest of what was tried, beside what the plan has."""
    print(f"{answer['case']} {answer['shape']}: {answer['tried']} tiles, {len(answer['rows'])} tried")
    rows: Sequence[dict[str, Any]] = answer["rows"]
    for label, row in [("planned", answer["planned"]), *(("", row) for row in rows[:_SHOWN])]:
        tile = row["variant"]
        time = f"{row['seconds'] * 1e6:9.1f} µs" if "seconds" in row else row["problem"]
        print(
            f"  {label:8} {tile['row_tile']:4} rows {tile['key_chunk']:4} keys {tile['warps']} warps "
            f"{tile['stages']} stages  {time}"
        )
    for row in answer.get("policies", [])[:_SHOWN]:
        print(
            f"           {row['items_per_thread']} items a thread, at least {row['split_keys']} keys a split  "
            f"{row['seconds'] * 1e6:9.1f} µs"
        )
    for row in answer.get("block_sizes", []):
        print(f"           blocks of {row['block_size']}  {row['seconds'] * 1e6:9.1f} µs", flush=True)
