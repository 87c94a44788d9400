"""Host time of preparing a decode step: mostly, of finding the requests that share a prefix.

Requests decode, each at another place in its last block. Before every step some of them have gone, and others have come
in their place, in blocks of their own after what they share. Timed is all that precedes the first layer, by thread CPU
time.

    python benchmarks/prefix_tree.py --json prefix_tree.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from attention_step import Case
from llmir_attention import plan_kernel
from numpy.typing import NDArray

from llmir.plan import PlannedKernel
from llmir.runtime.cpu import CpuAttentionRunner
from llmir.runtime.prefix_finder import PrefixFinder
from llmir.runtime.step import Step

Table = NDArray[np.int32]

BLOCK_SIZE = 16
#: Blocks that follow in the table after those counted, as a framework's table has room for more.
SPARE_COLUMNS = 64
GROUPS = 32
CHANGES = (0, 1, 64)


@dataclass(frozen=True)
class Times:
    """Milliseconds."""

    shape: str
    requests: int
    blocks: int
    """Of each request."""
    changed: int
    """Requests that go before each step, and come."""
    nodes: int
    """Of the prefix tree, after the last step."""
    first: float
    """Of the first step, in which all requests are new."""
    median: float
    """Of the steps after it."""
    most: float
    without_sharing: float
    """The median, where nothing is ever shared."""


class Requests:
    """Requests in random rows of a block table, with blocks in random places; two that share begin with equal ones."""

    def __init__(self, requests: int, blocks: int, shape: str):
        self._rng = np.random.default_rng(0)
        self._numbers = iter(range(2**30, 2**31))
        self.count, self.blocks = requests, blocks
        self._shared = self._rng.permutation(requests * blocks).astype(np.int32).reshape(requests, blocks)
        self.table = np.empty((requests, blocks + SPARE_COLUMNS), np.int32)
        self._prefix = SHAPES[shape]
        for row, number in enumerate(self._rng.permutation(requests).tolist()):
            self._come(row, number)

    def _come(self, row: int, number: int) -> None:
        self.table[row] = np.fromiter(self._numbers, np.int32, self.table.shape[1])
        begin = 0
        for whose, end in self._prefix(self, number):
            self.table[row, begin:end] = self._shared[whose, begin:end]
            begin = end

    def change(self, changed: int) -> None:
        """Lets some requests go, and others come in their rows."""
        for row in self._rng.choice(self.count, changed, replace=False).tolist():
            self._come(row, int(self._rng.integers(self.count)))

    def lengths(self, step: int) -> NDArray[np.int32]:
        """Tokens of each request."""
        in_last_block = (np.arange(self.count) * 37 + step) % BLOCK_SIZE
        return (self.blocks * BLOCK_SIZE + in_last_block + 1).astype(np.int32)


def _groups(them: Requests, number: int) -> Iterable[tuple[int, int]]:
    return [(number % GROUPS, them.blocks // 2)] if 2 * number < them.count else []


def _chain(them: Requests, number: int) -> Iterable[tuple[int, int]]:
    return [(0, number * them.blocks // them.count)]


def _tree(them: Requests, number: int) -> Iterable[tuple[int, int]]:
    levels = (them.count - 1).bit_length()
    return [((1 << level) + number % (1 << level) - 1, level * them.blocks // levels) for level in range(levels)]


#: Of a request, by its number: whose shared blocks it begins with up to where, then whose it goes on with.
SHAPES: dict[str, Callable[[Requests, int], Iterable[tuple[int, int]]]] = {
    f"half of them in {GROUPS} groups": _groups,
    "a chain, each prefix in the next": _chain,
    "a binary tree": _tree,
    "nothing shared": lambda them, number: [],
}


def runner(kernel: PlannedKernel) -> CpuAttentionRunner:
    """What prepares steps for ``kernel``, which is never called."""
    return CpuAttentionRunner(SimpleNamespace(spec=kernel.spec, function=None, openmp={}), kernel.policy)  # type: ignore[arg-type]


def milliseconds(prepares: CpuAttentionRunner, requests: Requests, changed: int, steps: int) -> Iterator[float]:
    """Of every step."""
    query_start = np.arange(requests.count + 1, dtype=np.int32)
    for step in range(steps):
        if step:
            requests.change(changed)
        lengths = requests.lengths(step)
        begin = time.thread_time_ns()
        prepares.begin_step(Step(query_start, lengths, requests.table), threads=2)
        yield (time.thread_time_ns() - begin) / 1e6


def times(kernel: PlannedKernel, shape: str, count: int, blocks: int, changed: int, steps: int) -> Times:
    """Times of one shape."""
    requests = Requests(count, blocks, shape)
    first, *following = milliseconds(runner(kernel), requests, changed, steps)
    nodes = len(PrefixFinder().find(requests.table, np.full(count, blocks)).first)
    alone = replace(kernel, policy=replace(kernel.policy, sharing=None))
    _, *plain = milliseconds(runner(alone), Requests(count, blocks, shape), changed, steps)
    found = (first, statistics.median(following), max(following), statistics.median(plain))
    return Times(shape, count, blocks, changed, nodes, *(round(each, 3) for each in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=1000, help="of each request, 16 tokens each")
    parser.add_argument("--steps", type=int, default=200, help="of each shape and number of changes")
    arguments = parser.parse_args()
    count, blocks = arguments.requests, arguments.blocks
    case = Case("decode", 32, 8, 128, requests=count, context=blocks * BLOCK_SIZE, new_tokens=1)
    kernel = plan_kernel(case, BLOCK_SIZE)
    print(f"{count} requests x {blocks} blocks, milliseconds of one thread")
    print(f"{'':36}{'changed':>8}{'nodes':>7}{'first':>8}{'median':>8}{'most':>8}{'no sharing':>12}")
    results = []
    for shape in SHAPES:
        for changed in CHANGES:
            result = times(kernel, shape, count, blocks, changed, arguments.steps)
            results.append(result)
            figures = f"{result.first:8.2f}{result.median:8.2f}{result.most:8.2f}{result.without_sharing:12.2f}"
            print(f"{result.shape:36}{result.changed:8}{result.nodes:7}{figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
