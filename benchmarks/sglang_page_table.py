"""Host time of learning the pages of a decode step's requests from SGLang's table of tokens, on a CPU.

Beside it: gathering the pages of all requests anew, as a backend does that keeps nothing. By thread CPU time; needs the
environment with SGLang.

    python benchmarks/sglang_page_table.py --json page_table.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from llmir.frontends.sglang.page_table import PageTable


@dataclass(frozen=True)
class Times:
    """Medians of milliseconds a step."""

    page_size: int
    requests: int
    tokens: int
    """Of each request."""
    write: float
    """SGLang's own writing of the new tokens, told to the table."""
    update: float
    gathered_anew: float


def gathered(slots: NDArray[np.int32], rows: NDArray[np.int64], tokens: int, page_size: int) -> NDArray[np.int32]:
    """The pages of all requests."""
    return slots[rows, :tokens:page_size] // page_size


def milliseconds(call: Callable[..., object], *arguments: Any) -> float:
    """Of one call."""
    begin = time.thread_time_ns()
    call(*arguments)
    return (time.thread_time_ns() - begin) / 1e6


def times(page_size: int, requests: int, tokens: int, steps: int) -> Times:
    """Of decode steps, in each of which every request gets a token."""
    pool = ReqToTokenPool(requests, tokens + steps, "cpu", enable_memory_saver=False)
    table = PageTable(pool, page_size)
    rows = torch.randperm(requests) + 1
    for row in rows.tolist():
        pool.write((row, slice(0, tokens)), torch.arange(tokens, dtype=torch.int32))
    table.update(rows.numpy(), np.full(requests, tokens, np.int32))
    slots, found = pool.req_to_token.numpy(), []
    for step in range(steps):
        places = torch.full((requests,), tokens + step)
        lengths = np.full(requests, tokens + step + 1, np.int32)
        values = torch.full((requests,), tokens + step, dtype=torch.int32)
        found.append(
            (
                milliseconds(pool.write, (rows, places), values),
                milliseconds(table.update, rows.numpy(), lengths),
                milliseconds(gathered, slots, rows.numpy(), tokens + step + 1, page_size),
            )
        )
    medians = (round(statistics.median(column), 3) for column in zip(*found, strict=True))
    return Times(page_size, requests, tokens, *medians)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=32_000, help="of each request")
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    results = [times(size, arguments.requests, arguments.tokens, arguments.steps) for size in (16, 1)]
    print(f"{'page size':>9}{'write':>8}{'update':>8}{'gathered anew':>15}   milliseconds")
    for result in results:
        print(f"{result.page_size:9}{result.write:8.2f}{result.update:8.2f}{result.gathered_anew:15.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
