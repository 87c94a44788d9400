"""Times implementations of one step side by side, and writes down what came out."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from attention_step import DTYPE_NAMES, VLLM_BLOCK_SIZE, Case, Side, Step, VllmAttention, stored
from llmir_attention import LlmirAttention

from llmir.errors import LlmirError
from llmir.kernels.reference import relative_error
from llmir.targets.x86.isa import INSTRUCTION_SETS

PEER = "vllm cpu_attention_with_kv_cache"


def interleaved(runners: dict[str, Callable[[], object]], threads: int, repeats: int) -> dict[str, float]:
    """Median seconds of each runner; one run of each in turn, so that a disturbance meets all alike.

    One thread is timed by its own CPU time, which other processes hardly touch; several by the wall clock.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():  # first calls touch pages and start threads
        run()
    for _ in range(repeats):
        for name, run in runners.items():
            begin = clock()
            run()
            seconds[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(
    case: Case, threads: Sequence[int], repeats: int, block_size: int, isa: str | None, ceiling: Ceiling
) -> list[dict]:
    """Rows of one case, one for each number of threads; ``fraction_of_ceiling`` is llmir's."""
    step = Step.random(case)
    exact = step.exact()
    llmir = LlmirAttention(step, block_size, isa)
    sides: dict[str, Side] = {"llmir": llmir, "peer": VllmAttention(step)}
    rows = []
    for count in threads:
        runners = {name: side.runner(count) for name, side in sides.items()}
        median = interleaved(runners | {"ceiling": ceiling.run}, count, repeats)
        rate = ceiling.work(case) / median["llmir"]
        rows.append(
            {
                "case": case.name,
                "dtype": str(case.dtype).removeprefix("torch."),
                "isa": llmir.isa,
                "threads": count,
                "peer": PEER,
                "llmir_seconds": median["llmir"],
                "peer_seconds": median["peer"],
                "speedup": median["peer"] / median["llmir"],
                "llmir_rel_error": relative_error(stored(sides["llmir"].output), exact),
                "peer_rel_error": relative_error(stored(sides["peer"].output), exact),
                "fraction_of_ceiling": rate / (ceiling.run_work / median["ceiling"]),
            }
        )
        _print_row(rows[-1], rate, ceiling)
    return rows


class Ceiling:
    """The rate that the memory or the arithmetic of this machine allows, measured in the same run.

    ``run`` does ``run_work`` units of work; ``work`` gives the units that a case needs.
    """

    unit: str
    run_work: float

    def run(self) -> object:
        """One measured run."""
        raise NotImplementedError

    def work(self, case: Case) -> float:
        """Units of work in ``case``."""
        raise NotImplementedError


class StreamingRead(Ceiling):
    """Reading 1 GiB from memory, in order."""

    unit = "B/s"
    run_work = float(1 << 30)

    def __init__(self) -> None:
        self.memory = torch.ones(1 << 28)

    def run(self) -> object:
        """Adds up the memory."""
        return self.memory.sum()

    def work(self, case: Case) -> float:
        """Bytes of keys and values."""
        return float(case.kv_bytes)


class MatrixProduct(Ceiling):
    """A matrix product of 2048 x 2048 x 2048, in the type that torch multiplies fastest here: float32 or bfloat16."""

    unit = "FLOP/s"
    run_work = 2.0 * 2048**3

    def __init__(self) -> None:
        operands = torch.randn(2, 2048, 2048)
        candidates = (operands, operands.bfloat16()) if torch.cpu._is_avx512_bf16_supported() else (operands,)
        self.left, self.right = min(candidates, key=_product_seconds)

    def run(self) -> object:
        """Multiplies."""
        return self.left @ self.right

    def work(self, case: Case) -> float:
        """Multiplications and additions."""
        return float(case.flops)


def _product_seconds(operands: torch.Tensor) -> float:
    """The faster of two runs of a product."""
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        operands[0] @ operands[1]
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _print_row(row: dict, rate: float, ceiling: Ceiling) -> None:
    print(
        f"{row['case']:8} {row['dtype']:9} {row['isa']}  {row['threads']} thread{'s' if row['threads'] > 1 else ' '}  "
        f"llmir {row['llmir_seconds'] * 1e3:8.2f} ms  vllm {row['peer_seconds'] * 1e3:8.2f} ms  "
        f"{row['speedup']:5.2f}x  rel. error {row['llmir_rel_error']:.2e} against {row['peer_rel_error']:.2e}  "
        f"{rate / 1e9:6.1f} G{ceiling.unit}, {row['fraction_of_ceiling']:.0%} of the ceiling",
        flush=True,
    )


def main(description: str, cases: Sequence[Case], ceiling: type[Ceiling]) -> None:
    """The command line of a benchmark script."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--case", choices=[c.name for c in cases], help="this case only")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, nargs="+", default=["bfloat16"])
    parser.add_argument("--isa", choices=INSTRUCTION_SETS, help="of llmir's kernel; this machine's best if left out")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--block-size", type=int, default=VLLM_BLOCK_SIZE, help="of llmir's cache, in tokens")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each side, of which the median counts")
    arguments = parser.parse_args()
    try:
        measured_ceiling = ceiling()
        rows = []
        for case, dtype in product(cases, arguments.dtype):
            if arguments.case in (None, case.name):
                case = replace(case, element_type=DTYPE_NAMES[dtype])
                how = arguments.threads, arguments.repeats, arguments.block_size, arguments.isa
                rows += measure(case, *how, measured_ceiling)
    except LlmirError as error:
        sys.exit(str(error))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
