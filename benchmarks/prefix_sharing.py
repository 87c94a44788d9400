"""Shared prefixes, read once against read by every request: one kernel, one cache, one process.

"Plain" is the same kernel with sharing off, over the same blocks, so a prefix that fits in the processor's cache is
fast there too. Both sides take turns; a ratio is the median of the turns' ratios, plain over shared. A single thread is
timed by its own CPU time, several by the wall clock. What the host does before a step is timed apart.

    python benchmarks/prefix_sharing.py --json prefix-sharing.json
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attention_step import DTYPE_NAMES
from shared_step import PLAIN, SHARED, Batch, Shape, SharedStep, SharingKernel

from llmir.compare.files import check_writable, write_json
from llmir.compare.machine import record, versions
from llmir.errors import LlmirError
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.targets.machine import Target
from llmir.targets.x86.isa import INSTRUCTION_SETS

LLAMA8B = Shape("llama8b", num_heads=32, num_kv_heads=8, head_size=128)
SMOLLM2 = Shape("smollm2", num_heads=9, num_kv_heads=3, head_size=64)

#: Each batch with the ratio it has to reach.
BATCHES = {
    "one": (Batch("one", LLAMA8B, ((1, 8192),), (256,) * 32), 2.3),
    "groups": (Batch("groups", LLAMA8B, ((4, 8192),), (256,) * 32), 1.8),
    "tree": (Batch("tree", LLAMA8B, ((1, 8192), (4, 4096)), (256,) * 32), 2.0),
}
SWEEP = "sweep"
#: Of the sweep: sharing may never be slower than this.
NEVER_SLOWER = 0.98
#: Relative error above which an answer is wrong: several times the rounding of a bf16 output (2 ** -9).
WRONG = 0.01

#: Memory read in turns: what calibration reads, so that little of it is still in a cache.
LEAST_MEMORY, MEMORY_CACHES = 256 << 20, 4
#: A sample calls the kernel as often as takes this long.
SAMPLE_SECONDS = 4e-3
HOST_REPEATS = 15
#: Both sides doing the same work shows the noise alone, in this part of the time.
ALIKE_TIME = 0.25


@dataclass(frozen=True)
class Sweep:
    """All combinations of these, for each shape."""

    requests: tuple[int, ...]
    shared: tuple[int, ...]
    """Tokens of one prefix that all requests share."""
    own: tuple[str, ...]
    """Tokens of each request alone; "ragged": from 1 to 2048."""


FULL_SWEEP = Sweep((1, 2, 4, 16, 32), (0, 16, 64, 128, 256, 1024, 4096), ("16", "256", "2048", "ragged"))
QUICK_SWEEP = Sweep((2, 32), (0, 64, 1024), ("16", "ragged"))
RAGGED = 2048


@dataclass(frozen=True)
class Effort:
    """How long to measure: until the ratio is known to ``precision``, within these bounds."""

    rounds: int
    """At least; an even number, so that each side goes first equally often."""
    seconds: float
    """At most."""
    precision: float = 0.005

    @property
    def longer(self) -> Effort:
        """Five times as long."""
        return Effort(self.rounds, 5 * self.seconds, self.precision / 2)


FULL, QUICK = Effort(6, 0.4), Effort(4, 0.2)


def sweep_batches(sweep: Sweep, shape: Shape) -> Iterator[Batch]:
    """The batches of a sweep, named ``OWN/REQUESTS/SHARED``."""
    generator = np.random.default_rng(3)
    for own in sweep.own:
        for requests in sweep.requests:
            ragged = generator.integers(1, RAGGED, requests, endpoint=True)
            tokens = ragged if own == "ragged" else [int(own)] * requests
            for shared in sweep.shared:
                yield Batch(f"{own}/{requests}/{shared}", shape, ((1, shared),), tuple(int(n) for n in tokens))


def measure(batch: Batch, kernel: SharingKernel, threads: int, effort: Effort) -> dict[str, Any]:
    """One row: times in seconds a layer, errors, and what sharing spares."""
    step = SharedStep(batch, kernel, threads)
    host = host_seconds(step)
    errors = step.errors()
    if not max(errors.values()) < WRONG:  # NaN is wrong too
        sys.exit(f"error: {batch.name}, {batch.shape.name}, {threads} threads: wrong answers, relative errors {errors}")
    return {
        "case": batch.name,
        "shape": batch.shape.name,
        "threads": threads,
        "requests": batch.requests,
        "shared_requests": step.schedules[SHARED].shared_requests,
        "alike": step.alike,
        **turns(step, effort),
        "kv_bytes_not_read": step.bytes_not_read,
        "errors": errors,
        "host_seconds": host,
    }


def turns(step: SharedStep, effort: Effort) -> dict[str, Any]:
    """Both sides one after the other, until the median ratio is certain enough.

    ``uncertainty``: half the 95 % interval of that median.
    """
    most_seconds = effort.seconds * (ALIKE_TIME if step.alike else 1)
    clock = time.thread_time if step.threads == 1 else time.perf_counter
    torch.set_num_threads(step.threads)

    def seconds(side: str, calls: int) -> float:
        begin = clock()
        step.run(side, calls)
        return (clock() - begin) / calls

    first = min(seconds(PLAIN, 1) for _ in range(3))
    calls = max(1, math.ceil(SAMPLE_SECONDS / first))
    times: dict[str, list[float]] = {PLAIN: [], SHARED: []}
    began, order, uncertainty = time.perf_counter(), [PLAIN, SHARED], math.inf
    while len(times[PLAIN]) < effort.rounds or (
        uncertainty > effort.precision and time.perf_counter() - began < most_seconds
    ):
        for _ in range(2):
            for side in order:
                times[side].append(seconds(side, calls))
            order.reverse()
        ratios = np.array(times[PLAIN]) / np.array(times[SHARED])
        uncertainty = median_uncertainty(ratios)
    return {
        "plain_seconds": statistics.median(times[PLAIN]),
        "shared_seconds": statistics.median(times[SHARED]),
        "ratio": float(np.median(ratios)),
        "uncertainty": uncertainty,
        "rounds": len(ratios),
        "calls_a_sample": calls,
    }


def median_uncertainty(values: np.ndarray) -> float:
    """Half the 95 % interval of a median, by ranks: few values are as uncertain as they are far apart."""
    ordered, middle, reach = np.sort(values), (len(values) - 1) / 2, 0.98 * math.sqrt(len(values))
    lower, upper = max(0, math.floor(middle - reach)), min(len(values) - 1, math.ceil(middle + reach))
    return float(ordered[upper] - ordered[lower]) / 2


def host_seconds(step: SharedStep) -> dict[str, float]:
    """Median seconds of what the host does once a step, for all layers together.

    "plain" and "shared": beginning a step like the last one; "first": with sharing, one that is not like the last.
    """
    kernel = step.kernel
    return {
        PLAIN: median_seconds(step, [kernel.runners[PLAIN]] * HOST_REPEATS),
        SHARED: median_seconds(step, [kernel.runners[SHARED]] * HOST_REPEATS),
        "first": median_seconds(step, [CpuAttentionRunner(kernel.loaded, kernel.policy) for _ in range(HOST_REPEATS)]),
    }


def median_seconds(step: SharedStep, runners: Sequence[CpuAttentionRunner]) -> float:
    """Of beginning the step with each of the runners."""
    seconds = []
    for runner in runners:
        begin = time.perf_counter()
        step.begin(runner)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def print_row(row: dict[str, Any]) -> None:
    host = {name: f"{1e6 * value:.0f}" for name, value in row["host_seconds"].items()}
    print(
        f"{row['case']:7} {counted(row['threads'], 'thread'):9}  plain {1e3 * row['plain_seconds']:7.2f} ms  "
        f"shared {1e3 * row['shared_seconds']:7.2f} ms  {row['ratio']:5.2f}x ± {row['uncertainty']:.2f} "
        f"(at least {row['at_least']})  {row['kv_bytes_not_read'] / 2**20:.0f} MiB not read\n"
        f"{'':18} rel. error {row['errors'][SHARED]:.1e}, plain {row['errors'][PLAIN]:.1e}  "
        f"host {host[SHARED]} µs, unlike the last step {host['first']}, plain {host[PLAIN]}",
        flush=True,
    )


def print_sweep(rows: Sequence[dict[str, Any]], sweep: Sweep) -> None:
    """A table of ratios: a line for each own length and number of requests, a column for each prefix length."""
    ratio = {row["case"]: "=" if row["alike"] else f"{row['ratio']:.2f}" for row in rows}
    where = f"{rows[0]['shape']}, {counted(rows[0]['threads'], 'thread')}"
    print(f"\n{where}: plain over shared by tokens shared; =: the same work list, nothing to share or not worth it")
    print(f"{'own':>8} {'requests':>9}   " + "".join(f"{shared:>8}" for shared in sweep.shared))
    for own in sweep.own:
        for requests in sweep.requests:
            cells = "".join(f"{ratio[f'{own}/{requests}/{shared}']:>8}" for shared in sweep.shared)
            print(f"{own:>8} {requests:>9}   {cells}", flush=True)


def print_least(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The worst of the sweep, and how far equal work lists came out apart, which is the noise of a row.

    Returned with the median ratio of each row whose work lists differ: a line a case, not every row's details.
    """
    alike = [row["ratio"] for row in rows if row["alike"]]
    others = [row for row in rows if not row["alike"]]
    shared = sum(row["shared_requests"] > 0 for row in rows)
    summary: dict[str, Any] = {"at_least": NEVER_SLOWER, "rows": len(rows), "shared": shared, "unlike": len(others)}
    summary["measured_again"] = sum("ratio_at_first" in row for row in rows)
    print(f"\nsweep: {len(rows)} rows, in {shared} of them something was shared")
    if others:
        least = min(others, key=lambda row: row["ratio"])
        summary["least"] = {name: least[name] for name in ("case", "shape", "threads", "ratio", "uncertainty")}
        summary["below"] = sum(row["ratio"] < NEVER_SLOWER for row in others)
        print(
            f"least ratio: {least['ratio']:.3f} ± {least['uncertainty']:.3f} (at least {NEVER_SLOWER}): own/requests/"
            f"shared {least['case']}, {least['shape']}, {counted(least['threads'], 'thread')}; {summary['below']} below"
        )
        slowest = {name: max(row["host_seconds"][name] for row in rows) for name in (PLAIN, SHARED, "first")}
        summary["most_host_seconds"] = slowest
        host = {name: f"{1e6 * seconds:.0f}" for name, seconds in slowest.items()}
        print(
            f"host time of a step: at most {host[SHARED]} µs, unlike the last step {host['first']}, plain {host[PLAIN]}"
        )
    if alike:
        lower, upper = (float(value) for value in np.percentile(alike, [2.5, 97.5]))
        summary["alike"] = {"lower": lower, "upper": upper}
        print(f"noise: 95 % of {len(alike)} rows with equal work lists came out between {lower:.3f} and {upper:.3f}")
    return summary | {"ratios": ratios(others)}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each shape and number of threads the ratios by case, to four decimals."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        where = f"{row['shape']}, {counted(row['threads'], 'thread')}"
        found.setdefault(where, {})[row["case"]] = round(row["ratio"], 4)
    return found


def counted(number: int, noun: str) -> str:
    """``2 threads``."""
    return f"{number} {noun}{'s' if number != 1 else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = Target.detect().cores
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is printed and the environment here")
    parser.add_argument("--case", nargs="+", choices=[*BATCHES, SWEEP], default=[*BATCHES, SWEEP], metavar="NAME")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, cores}))
    parser.add_argument("--dtype", choices=DTYPE_NAMES, default="bfloat16", help="of queries and cache")
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="of the kernel; this machine's best if left out")
    parser.add_argument("--block-size", type=int, default=16, help="tokens in a block of the cache")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and a small sweep")
    arguments = parser.parse_args()
    try:
        if arguments.json:
            check_writable(arguments.json)
        shapes = [replace(shape, element_type=DTYPE_NAMES[arguments.dtype]) for shape in (LLAMA8B, SMOLLM2)]
        result = run(shapes, arguments.isa, arguments.case, arguments.threads, arguments.block_size, arguments.quick)
        if arguments.json:
            write_json(arguments.json, result)
    except LlmirError as error:
        sys.exit(str(error))


def run(
    shapes: Sequence[Shape],
    isa: str | None,
    cases: Sequence[str],
    threads: Sequence[int],
    block_size: int,
    quick: bool,
) -> dict[str, Any]:
    """Measures and prints; everything that came out, as JSON values."""
    sweep, effort = (QUICK_SWEEP, QUICK) if quick else (FULL_SWEEP, FULL)
    environment = record() | {"versions": versions(())}
    memory = max(LEAST_MEMORY, MEMORY_CACHES * Target.detect().cache_bytes(3))
    rows: list[dict[str, Any]] = []
    swept: list[dict[str, Any]] = []
    policies = {}
    for shape in shapes:
        named = [
            (replace(batch, shape=shape), at_least)
            for batch, at_least in (BATCHES[name] for name in cases if name in BATCHES)
            if batch.shape.name == shape.name
        ]
        batches = list(sweep_batches(sweep, shape)) if SWEEP in cases else []
        if not named and not batches:
            continue
        largest = max(batch.block_table(block_size)[1] for batch in [*batches, *(batch for batch, _ in named)])
        kernel = SharingKernel(shape, block_size, max(memory, largest * block_size * shape.token_bytes), isa)
        policies[shape.name] = asdict(kernel.policy)
        costs = kernel.policy.sharing
        how = f"{shape.name}, {shape.element_type} by {kernel.spec.isa}"
        print(f"{how}: " + (f"shares from {costs.least_tokens} tokens on" if costs else "shares nothing here"))
        for number in threads:
            for batch, at_least in named:
                rows.append(measure(batch, kernel, number, effort.longer) | {"at_least": at_least})
                print_row(rows[-1])
            if batches:
                swept += [swept_row(batch, kernel, number, effort) for batch in batches]
                print_sweep(swept[-len(batches) :], sweep)
    what = {"isa": kernel.spec.isa, "element_type": shapes[0].element_type}
    result = {"environment": environment, **what, "block_size": block_size, "policies": policies, "rows": rows}
    return result | ({"sweep": print_least(swept)} if swept else {})


def swept_row(batch: Batch, kernel: SharingKernel, threads: int, effort: Effort) -> dict[str, Any]:
    """A row of the sweep. One that seems too slow is measured anew and longer, and that alone counts: the least of many
    short measurements is their noise."""
    row = measure(batch, kernel, threads, effort)
    if row["alike"] or row["ratio"] >= NEVER_SLOWER:
        return row
    return measure(batch, kernel, threads, effort.longer) | {"ratio_at_first": row["ratio"]}


if __name__ == "__main__":
    main()
