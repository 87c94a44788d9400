"""Which process runs next, whether a further pair fits a budget, and how long all that is left will take.

Nothing here is a guess about a machine: a step is expected to take as long as it took the last time, and what has never
run is said to be unknown.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from llmir.compare.job import steps
from llmir.compare.options import CompareOptions

SIDES = ("baseline", "llmir")


@dataclass(frozen=True)
class Process:
    """One process of a comparison."""

    framework: int
    """Its place among those asked for."""
    pair: int
    side: str


@dataclass(frozen=True)
class Left:
    """Seconds that are left: of what has run before, and whether that is everything."""

    seconds: float
    complete: bool
    at_most: float = math.inf
    """Where a budget says so: it ends further pairs."""

    def __str__(self) -> str:
        """For a user, in minutes; empty where nothing can be said."""
        least = _minutes(self.seconds)
        if self.complete:
            return f"about {least} min left" if least else "less than a minute left"
        most = _minutes(self.at_most) if self.at_most < math.inf else 0
        if most > least:
            return f"{least} to {most} min left" if least else f"up to {most} min left"
        return f"more than {least} min left" if least else ""


def _minutes(seconds: float) -> int:
    return round(seconds / 60)


def order(pairs: int) -> Iterator[tuple[int, str]]:
    """(pair, side) in the order of running: each pair starts with the side the last one ended with.

    So neither side always runs first, and a drift of the machine falls on both alike.
    """
    for pair in range(pairs):
        for side in _sides(pair):
            yield pair, side


def _sides(pair: int) -> tuple[str, ...]:
    return SIDES if pair % 2 == 0 else SIDES[::-1]


class Schedule:
    """The processes of a comparison, in order, and the time they took.

    Without a budget one framework's pairs follow the other's. With one, the first pair of every framework runs, and
    then further pairs in turns, as long as what they are expected to take fits.
    """

    def __init__(
        self,
        asked: Sequence[CompareOptions],
        budget_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._asked = list(asked)
        self._clock = clock
        self._end = math.inf if budget_seconds is None else clock() + budget_seconds
        pairs = [(i, pair) for i, options in enumerate(asked) for pair in range(options.pair_count())]
        if budget_seconds is not None:
            pairs.sort(key=lambda entry: entry[1])  # stable: within a round as the frameworks were asked for
        self._pairs = pairs
        self._of_pair: list[Process] = []
        self._running: Process | None = None
        self._steps: list[str] = []
        """Of the running process, those to come."""
        self._since = clock()
        """When the step that is running began."""
        self._took: dict[tuple[int, str, str], float] = {}
        self.finished = 0
        """Processes."""

    def leave_out(self, framework: int, workloads: Iterable[str]) -> None:
        """Run these workloads of a framework no more."""
        options = self._asked[framework]
        self._asked[framework] = replace(options, left_out=(*options.left_out, *workloads))

    def next(self) -> Process | None:
        """The process to run now; None when all are done, or when no further pair fits."""
        if not self._of_pair:
            self._pairs = self._fitting(self._remaining())
            if not self._pairs:
                return None
            framework, pair = self._pairs.pop(0)
            self._of_pair = [Process(framework, pair, side) for side in _sides(pair)]
        return self._of_pair.pop(0)

    def begin(self, process: Process) -> None:
        """A process starts."""
        self._running, self._since = process, self._clock()
        self._steps = self._steps_of(process)

    def done(self, step: str) -> None:
        """A step of the running process is done."""
        if self._running is None or step not in self._steps:
            return
        now = self._clock()
        self._took[self._running.framework, self._running.side, step] = now - self._since
        self._since = now
        self._steps = self._steps[self._steps.index(step) + 1 :]

    def end(self) -> None:
        """The running process has ended."""
        self._running, self._steps = None, []
        self.finished += 1

    def allotted(self, process: Process) -> float | None:
        """Seconds that a framework's very first process may take, so that what has to run ends within the budget.

        An equal share of what remains for each side of every framework that has not run yet. None without a budget, and
        for every other process: that runs what the first one ran.
        """
        if self._end == math.inf or process.pair or process.side != SIDES[0]:
            return None
        waiting = {framework for framework, pair in self._pairs if pair == 0} - {process.framework}
        return max(0.0, self._remaining()) / (len(SIDES) * (1 + len(waiting)))

    def total(self) -> int:
        """Processes that were run, are running, and will be run as far as one can tell."""
        running = self._running is not None
        return self.finished + running + len(self._of_pair) + len(SIDES) * len(self._fitting(self._after_this_pair()))

    def left(self) -> Left:
        """What is left of everything."""
        seconds, complete = self._this_pair()
        for framework, pair in self._fitting(self._remaining() - seconds):
            of_pair, known = self._expected(Process(framework, pair, side) for side in SIDES)
            seconds, complete = seconds + of_pair, complete and known
        return Left(seconds, complete, max(0.0, self._remaining()))

    def _remaining(self) -> float:
        return self._end - self._clock()

    def _after_this_pair(self) -> float:
        return self._remaining() - self._this_pair()[0]

    def _this_pair(self) -> tuple[float, bool]:
        """Seconds that the pair under way will still take, as far as they are known, and whether all are."""
        seconds, complete = self._expected(self._of_pair)
        if self._running is None:
            return seconds, complete
        expected = [self._expect(self._running, step) for step in self._steps]
        if expected and expected[0] is not None:  # the one that runs has taken some of its time
            expected[0] = max(0.0, expected[0] - (self._clock() - self._since))
        return seconds + sum(filter(None, expected)), complete and None not in expected

    def _fitting(self, seconds: float) -> list[tuple[int, int]]:
        """The pairs to come: first ones, and further ones while they fit; a framework's next is as long as its last."""
        fitting, over = [], set()
        for framework, pair in self._pairs:
            expected = self._expected(Process(framework, pair, side) for side in SIDES)[0]
            if framework in over or (pair and expected > seconds):
                over.add(framework)
                continue
            seconds -= expected
            fitting.append((framework, pair))
        return fitting

    def _expected(self, processes: Iterable[Process]) -> tuple[float, bool]:
        """Seconds that whole processes will take, as far as they are known, and whether all of them are."""
        expected = [self._expect(process, step) for process in processes for step in self._steps_of(process)]
        return sum(filter(None, expected)), None not in expected

    def _expect(self, process: Process, step: str) -> float | None:
        """As long as the step took the last time, on this side or else on the other one."""
        return next(
            (
                self._took[process.framework, side, step]
                for side in (process.side, *SIDES)
                if (process.framework, side, step) in self._took
            ),
            None,
        )

    def _steps_of(self, process: Process) -> list[str]:
        options = self._asked[process.framework]
        # Answers do not change from pair to pair: one process of each side is asked.
        return steps(options.runs(), options.quality and process.pair == 0)
