"""Times llmir and its peers on one batch after another: same process, same inputs, caches in turn."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmir.runtime.gpu import StepLimits
from on_gpu.batches import Batch
from on_gpu.llmir_side import LlmirSide, Plans, Runners
from on_gpu.peer import Side, Unserved, one_line
from on_gpu.peers import Peers
from on_gpu.step import GRAIN, PLAIN, TINY_GRAIN, Arena, Features, Step
from on_gpu.timing import Budget, Rounds, Run, captured, clock_for, host_seconds, interleaved, spread

#: Caches are read in turn until so many bytes have passed: twenty times the L2 cache of an H100, so little of one is
#: still there when its turn comes again.
ROTATED_BYTES = 1 << 30
#: Calls in one timed sample, of calls made by the host and of those in one CUDA graph.
MOST_CALLS, MOST_CALLS_IN_GRAPH = 32, 128
#: Seconds of timing that a case gets at most, each for calls by the host and in a graph.
CASE_SECONDS = 1.5
#: Seconds that must be left for another case to begin.
RESERVE_SECONDS = 8.0
#: Part of the device's free memory that keys and values take, and llmir's copy of them as much again.
MEMORY_PART = 0.43
#: Relative errors above which an answer is wrong: bf16 rounds to 2 ** -9 of a value; the output is rounded and so are
#: the weights before the second product. The worst row of one head may be off by four times as much.
WRONG, WRONG_ROW = 2**-8, 2**-6
#: Peers may be off by twice as much: some round the parts of an attention before they merge them.
PEERS_FACTOR = 2

STREAM, GRAPH = "stream", "graph"
LLMIR = "llmir"


@dataclass(frozen=True)
class Effort:
    """How often things are repeated."""

    rounds: Rounds
    least_calls: int
    """Calls in a timed sample, at least."""
    most_layers: int
    """Caches that are read in turn, at most."""
    host_repeats: int


FULL = Effort(Rounds(least=5, most=41, warm_up=2), least_calls=4, most_layers=256, host_repeats=9)
TINY = Effort(Rounds(least=1, most=1, warm_up=0), least_calls=1, most_layers=2, host_repeats=1)


@dataclass
class Bench:
    """What all cases share, and what came out."""

    device: torch.device
    plans: Plans
    peers: Peers
    ceilings: dict[str, Any]
    budget: Budget
    generator: torch.Generator
    tiny: bool
    features: Features = PLAIN
    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def run(self, batches: Sequence[Batch], report: Any) -> None:
        """Measures the batches in order; ``report`` is called with the rows of each."""
        if not batches:
            return
        limits = StepLimits(max(b.requests for b in batches), max(b.tokens for b in batches))
        self._effort = TINY if self.tiny else FULL
        self._runners = Runners(limits, self.device)
        self._arena = Arena(self._arena_bytes(batches), self.features.element_type, self.device, self.generator)
        for number, batch in enumerate(batches):
            if self.budget.left < RESERVE_SECONDS:
                self._leave_out(batch, "no time was left")
                continue
            try:
                rows = self._measured(batch, len(batches) - number)
            except Exception as error:  # what was measured before is to be written down all the same
                self._fail(batch, LLMIR, "all", one_line(error))
                continue
            self.rows += rows
            report(batch, rows)

    def _leave_out(self, batch: Batch, reason: str, side: str = "all") -> None:
        self.left_out.append({"case": batch.name, "shape": str(batch.shape), "side": side, "reason": reason})

    def _fail(self, batch: Batch, family: str, side: str, problem: str) -> None:
        """Leaves a side out; of llmir's, that is an error of the whole run."""
        self._leave_out(batch, problem, side)
        if family == LLMIR:
            self.wrong.append({"case": batch.name, "shape": str(batch.shape), "side": side, "problem": problem})

    def _arena_bytes(self, batches: Iterable[Batch]) -> int:
        """As much as the largest batch takes that fits."""
        needed = max(max(self._cache_bytes(b), 0 if self.tiny else ROTATED_BYTES) for b in batches) + ROTATED_BYTES
        if self.device.type != "cuda":
            return min(needed, 1 << 24)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return min(needed, int(free * MEMORY_PART)) // 4 * 4

    def _grain(self, batch: Batch) -> int:
        block_size = self.plans.kernel(batch.shape, self.features).spec.attention.cache.block_size
        return max(TINY_GRAIN if self.tiny else GRAIN, block_size)

    def _cache_bytes(self, batch: Batch) -> int:
        """Bytes of one layer's cache, its last units as they are filled up."""
        grain = self._grain(batch)
        units = sum(-(-own // grain) for own in batch.own) + sum(g * tokens // grain for g, tokens in batch.shared)
        return units * grain * batch.shape.token_bytes

    def _measured(self, batch: Batch, cases_left: int) -> list[dict[str, Any]]:
        """The rows of one batch; none where it does not fit."""
        size, room = self._cache_bytes(batch), self._arena.tokens.numel() * 2
        if size > room:
            self._leave_out(batch, f"{size / 2**30:.0f} GiB of keys and values, and {room / 2**30:.0f} have room twice")
            return []
        layers = min(-(-ROTATED_BYTES // size), room // size, self._effort.most_layers)
        step = Step(batch, self._arena, layers, self._grain(batch), self.generator)
        sides = self._sides(batch, step)
        facts = self._checked(batch, step, sides)
        right = [(family, side) for family, side in sides if side.name in facts]
        seconds = min(CASE_SECONDS, self.budget.left / cases_left / 4)
        calls = {STREAM: max(self._effort.least_calls, min(layers, MOST_CALLS))}
        modes = {STREAM: {side.name: self._calls(side, layers, calls[STREAM]) for _, side in right}}
        if batch.decodes and self.device.type == "cuda":
            calls[GRAPH] = max(self._effort.least_calls, min(layers, MOST_CALLS_IN_GRAPH))
            modes[GRAPH] = self._graphs(batch, step, right, layers, calls[GRAPH])
        rows: list[dict[str, Any]] = []
        for mode, runs in modes.items():
            if runs:
                launches = calls[mode] if mode == STREAM else 1
                times = interleaved(runs, clock_for(self.device), seconds, self._effort.rounds, launches)
                timed = {name: spread(each, calls[mode]) for name, each in times.items()}
                rows += self._rows(batch, mode, layers, timed, facts)
        return rows

    def _sides(self, batch: Batch, step: Step) -> list[tuple[str, Side]]:
        """llmir first, then every peer that serves the batch; with whose they are."""
        planned = self.plans.kernel(batch.shape, self.features)
        sides: list[tuple[str, Side]] = [(LLMIR, side) for side in self._runners.sides(planned, step)]
        for peer in self.peers.present:
            try:
                sides += [(peer.name, side) for side in peer.sides(step)]
            except Unserved as reason:
                self._leave_out(batch, str(reason), peer.name)
            except Exception as error:  # another project's code: its failure is a finding, not ours to handle
                self._leave_out(batch, one_line(error), peer.name)
        return sides

    def _checked(self, batch: Batch, step: Step, sides: Sequence[tuple[str, Side]]) -> dict[str, dict[str, Any]]:
        """What is known of each side whose answers are right: errors, and the host's seconds of preparing a step."""
        facts: dict[str, dict[str, Any]] = {}
        for family, side in sides:
            try:
                side.prepare()
                side.run(0)
                error, worst = step.errors(side.output)
            except Exception as failure:
                self._fail(batch, family, side.name, one_line(failure))
                continue
            if is_wrong(family, error, worst):
                self._fail(batch, family, side.name, f"wrong: relative error {error:.1e}, worst row {worst:.1e}")
                continue
            facts[side.name] = {
                "family": family,
                "relative_error": error,
                "worst_row": worst,
                "prepare_seconds": host_seconds(side.prepare, self._effort.host_repeats),
            }
            if isinstance(side, LlmirSide) and side.schedule is not None:
                facts[side.name] |= {
                    "prepare_changed_seconds": host_seconds(
                        side.prepare, self._effort.host_repeats, side.prepare_other
                    ),
                    "items": len(side.schedule.items),
                    "merged_tokens": side.schedule.merges.count,
                    "shared_requests": side.schedule.shared_requests,
                }
        return facts

    def _calls(self, side: Side, layers: int, calls: int) -> Run:
        """So many calls, each of the next layer."""
        at = 0

        def run() -> None:
            nonlocal at
            for _ in range(calls):
                side.run(at)
                at = (at + 1) % layers

        return run

    def _graphs(
        self, batch: Batch, step: Step, sides: Sequence[tuple[str, Side]], layers: int, calls: int
    ) -> dict[str, Run]:
        """As many calls as a CUDA graph, of each side that can be captured and whose replay gives the right answer."""
        graphs: dict[str, Run] = {}
        for family, side in sides:
            try:
                side.prepare()
                replay = captured(functools.partial(_first_layer_last, side, layers, calls))
                side.output.fill_(torch.nan)
                replay()
                error, worst = step.errors(side.output)
            except Exception as failure:
                self._fail(batch, family, side.name, f"cannot be captured or replayed: {one_line(failure)}")
                continue
            if is_wrong(family, error, worst):
                problem = f"wrong when replayed: relative error {error:.1e}, worst row {worst:.1e}"
                self._fail(batch, family, side.name, problem)
                continue
            graphs[side.name] = replay
        return graphs

    def _rows(
        self, batch: Batch, mode: str, layers: int, timed: dict[str, dict[str, Any]], facts: dict[str, dict[str, Any]]
    ) -> list[dict[str, Any]]:
        peers = {name: row["seconds"] for name, row in timed.items() if facts[name]["family"] != LLMIR}
        best = min(peers, key=peers.__getitem__, default=None)
        rows = []
        for name, times in timed.items():
            row = {
                "case": batch.name,
                "shape": str(batch.shape),
                "mode": mode,
                "side": name,
                **times,
                "layers": layers,
                "bytes": batch.moved_bytes,
                "flops": batch.flops,
                **shares(batch, times["seconds"], self.ceilings),
                **facts[name],
            }
            if facts[name]["family"] == LLMIR:
                plan = self.plans.kernel(batch.shape, self.features).source
                row |= {"plan": plan, "best_peer": best, "ratio": peers[best] / times["seconds"] if best else None}
            rows.append(row)
        return rows


def _first_layer_last(side: Side, layers: int, calls: int) -> None:
    """So many calls of one layer after another, the last of the one whose answer is known."""
    for call in range(1 - calls, 1):
        side.run(call % layers)


def is_wrong(family: str, error: float, worst: float) -> bool:
    """Whether an answer is; NaN is wrong too."""
    factor = 1 if family == LLMIR else PEERS_FACTOR
    return not (error < factor * WRONG and worst < factor * WRONG_ROW)


def shares(batch: Batch, seconds: float, ceilings: dict[str, Any]) -> dict[str, Any]:
    """How near a time is to what the device can do: parts of the copy bandwidth and of the matrix product's rate, and
    which of the two allows less."""
    bandwidth = batch.moved_bytes / seconds / ceilings["copy_bytes_per_second"]
    product = batch.flops / seconds / ceilings["bf16_flops_per_second"]
    ceiling = "copy bandwidth" if bandwidth > product else "matrix product"
    return {
        "bandwidth_share": bandwidth,
        "product_share": product,
        "ceiling": ceiling,
        "share": max(bandwidth, product),
    }
