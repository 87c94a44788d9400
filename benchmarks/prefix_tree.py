"""Host time of finding the requests that share a prefix, in the block tables of decode steps.

First: a finder that has not seen the step before. Next: the step after it, in which some requests have a block more.

    python benchmarks/prefix_tree.py --json prefix_tree.json
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmir.runtime.prefix_tree import PrefixFinder

REQUESTS, BLOCKS = 256, 128
#: A request of a decode step begins a new block every so many steps.
BLOCK_SIZE = 128
#: Blocks that follow in the table after those counted, as a framework's table has room for more.
SPARE_COLUMNS = 64


@dataclass(frozen=True)
class Times:
    """Microseconds, the best of several runs."""

    shape: str
    nodes: int
    first: float
    next: float
    """The mean of following steps."""


class Tables:
    """Block tables of requests in random order, with blocks in random places."""

    def __init__(self, seed: int = 0):
        self._rng = np.random.default_rng(seed)
        columns = BLOCKS + SPARE_COLUMNS
        self._table = self._rng.permutation(REQUESTS * columns).astype(np.int32).reshape(REQUESTS, columns)

    def groups(self, *levels: tuple[int, int]) -> NDArray[np.int32]:
        """Equal groups that share a prefix; ``levels``: (groups, end of the shared part in blocks), outermost first."""
        begin = 0
        for groups, end in levels:
            for group in np.split(self._table, groups):
                group[:, begin:end] = group[0, begin:end]
            begin = end
        return self._rng.permutation(self._table)

    def random(self) -> NDArray[np.int32]:
        """A tree that parts at random places into up to four branches, as long as they have more than 8 requests."""
        self._grow(0, REQUESTS, 0)
        return self._rng.permutation(self._table)

    def _grow(self, first: int, last: int, begin: int) -> None:
        end = begin + int(self._rng.integers(1, 33))
        if last - first < 2 or end >= BLOCKS:
            return
        self._table[first:last, begin:end] = self._table[first, begin:end]
        if last - first > 8:
            cuts = np.sort(self._rng.integers(first, last, 3)).tolist()
            for start, stop in zip([first, *cuts], [*cuts, last], strict=True):
                self._grow(start, stop, end)


def complete_blocks(step: int) -> NDArray[np.int64]:
    """Of every request, each of which is at another place in its last block."""
    return BLOCKS - 1 + (np.arange(REQUESTS) * 37 % BLOCK_SIZE + step) // BLOCK_SIZE


def times(shape: str, table: NDArray[np.int32], repeats: int) -> Times:
    """Times of one table; each repeat is a first step and as many following ones as fill a block."""
    counts = [complete_blocks(step) for step in range(BLOCK_SIZE)]
    first, following = [], []
    for _ in range(repeats):
        finder = PrefixFinder()
        ticks = [time.perf_counter_ns()]
        for blocks in counts:
            tree = finder.find(table, blocks)
            ticks.append(time.perf_counter_ns())
        taken = np.diff(ticks) / 1e3
        first.append(taken[0])
        following.append(taken[1:].mean())
    return Times(shape, len(tree.first), round(min(first), 1), round(min(following), 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--repeats", type=int, default=20, help="runs of 128 steps, of which the best counts")
    arguments = parser.parse_args()
    shapes = {
        "one group of 256, 64 blocks shared": Tables().groups((1, 64)),
        "8 groups of 32, 64 blocks shared": Tables().groups((8, 64)),
        "two levels: 64 blocks, 4 x 32 below": Tables().groups((1, 64), (4, 96)),
        "three levels: 32, 4 x 32, 32 x 32": Tables().groups((1, 32), (4, 64), (32, 96)),
        "random tree": Tables().random(),
        "binary tree, 256 leaves": Tables().groups(*((2**k, 14 * (k + 1)) for k in range(8))),
        "nothing shared": Tables().groups(),
    }
    results = [times(shape, table, arguments.repeats) for shape, table in shapes.items()]
    print(f"{REQUESTS} requests x {BLOCKS} blocks, microseconds")
    print(f"{'':40}{'nodes':>6}{'first':>8}{'next':>8}")
    for result in results:
        print(f"{result.shape:40}{result.nodes:6}{result.first:8.1f}{result.next:8.1f}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
