"""Clocks, rounds and ceilings of benchmarks/gpu.py."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

#: Of each buffer that is copied: far beyond any L2 cache.
COPY_BYTES = 1 << 30
#: Of the matrix product.
PRODUCT_SIZE = 8192
#: A device waits so long before a sample, a tenth of a millisecond, and a quarter of that again for each call of it:
#: the host takes as long to make one.
AHEAD_CYCLES, AHEAD_CYCLES_A_CALL = 200_000, 50_000

Run = Callable[[], object]


class Clock(Protocol):
    """Times what is put on the device between two calls."""

    def ahead(self, calls: int) -> None:
        """Keeps the device waiting for a while, so that the host is ahead of it by so many calls."""

    def start(self) -> Any:
        """A mark."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks; waits until the second has passed."""

    def wait(self) -> None:
        """Until the device has nothing to do."""


class EventClock:
    """CUDA events on the current stream: the device's own time."""

    def ahead(self, calls: int) -> None:
        """See :class:`Clock`."""
        torch.cuda._sleep(AHEAD_CYCLES + calls * AHEAD_CYCLES_A_CALL)

    def start(self) -> torch.cuda.Event:
        """See :class:`Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See :class:`Clock`."""
        return begin.elapsed_time(end) / 1e3

    def wait(self) -> None:
        """See :class:`Clock`."""
        torch.cuda.synchronize()


class HostClock:
    """The wall clock, where there is no device: its times say nothing about one."""

    def ahead(self, calls: int) -> None:
        """See :class:`Clock`."""

    def start(self) -> float:
        """See :class:`Clock`."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """See :class:`Clock`."""
        return end - begin

    def wait(self) -> None:
        """See :class:`Clock`."""


def clock_for(device: torch.device) -> Clock:
    """How calls on ``device`` are timed."""
    return EventClock() if device.type == "cuda" else HostClock()


class Budget:
    """The seconds that a run may take, from when it was made."""

    def __init__(self, seconds: float):
        self._begin, self.total = time.perf_counter(), seconds

    @property
    def used(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self._begin

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it."""
        return self.total - self.used


@dataclass(frozen=True)
class Rounds:
    """How often each side is timed."""

    least: int
    most: int
    warm_up: int
    """Before them, not counted."""


CEILING_ROUNDS = Rounds(15, 15, 2)


def interleaved(
    sides: Mapping[str, Run], clock: Clock, seconds: float, rounds: Rounds, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds of every run of each side: one run of each in turn, so that a disturbance meets all alike.

    As many rounds as fit in ``seconds``; each begins with another side. ``calls``: how many the host makes in a run.
    """
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    number = -rounds.warm_up
    while number < rounds.least or (number < rounds.most and time.perf_counter() - began < seconds):
        turn = number % len(names)
        marks = []
        for name in names[turn:] + names[:turn]:
            clock.ahead(calls)
            begin = clock.start()
            sides[name]()
            marks.append((name, begin, clock.start()))
        clock.wait()
        if number >= 0:
            for name, begin, end in marks:
                times[name].append(clock.seconds(begin, end))
        number += 1
    return times


def spread(times: Sequence[float], calls: int) -> dict[str, Any]:
    """Median, quartiles and least of the seconds of one call, where each time is of ``calls``."""
    each = sorted(seconds / calls for seconds in times)
    lower, middle, upper = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {"seconds": middle, "lower": lower, "upper": upper, "least": each[0], "rounds": len(each), "calls": calls}


def host_seconds(call: Run, repeats: int, before: Run = lambda: None) -> float:
    """Median wall-clock seconds of what the host does in a call, ``before`` each of which something else is done; the
    device is not waited for."""
    times = []
    for _ in range(repeats):
        before()
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def captured(run: Run) -> Run:
    """What replays ``run`` as one CUDA graph; RuntimeError where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # first calls allocate and compile, which a capture forbids
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def ceilings(device: torch.device, tiny: bool) -> dict[str, Any]:
    """What this device can do, measured: bytes a second of copying (read and written) and of reading alone, bf16
    multiplications and additions a second of a large matrix product; and what was measured."""
    elements = COPY_BYTES // 4 if not tiny else 1 << 12
    size = PRODUCT_SIZE if not tiny else 64
    source, target = torch.randn(elements, device=device), torch.empty(elements, device=device)
    left, right = torch.randn(2, size, size, device=device).bfloat16()
    product = torch.empty_like(left)
    runs: dict[str, tuple[Run, float]] = {
        "copy_bytes_per_second": (lambda: target.copy_(source), 8.0 * elements),
        "read_bytes_per_second": (lambda: torch.sum(source), 4.0 * elements),
        "bf16_flops_per_second": (lambda: torch.mm(left, right, out=product), 2.0 * size**3),
    }
    clock = clock_for(device)
    sides = {name: run for name, (run, _) in runs.items()}
    times = interleaved(sides, clock, 0, CEILING_ROUNDS)
    rates = {name: work / statistics.median(times[name]) for name, (_, work) in runs.items()}
    return rates | {"buffer_bytes": 4 * elements, "product_size": size}
