"""What runs when, and what is said to be left, with a clock that only the test moves."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from llmir.compare.options import CompareOptions
from llmir.compare.schedule import Left, Process, Schedule, order

Options = Callable[..., CompareOptions]


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def run(schedule: Schedule, clock: Clock, seconds: dict[str, float], processes: int = 1000) -> list[Process]:
    """Run processes whose steps take ``seconds``; those that ran."""
    ran: list[Process] = []
    while len(ran) < processes and (process := schedule.next()) is not None:
        schedule.begin(process)
        for step, took in seconds.items():
            clock.now += took
            schedule.done(step)
        schedule.end()
        ran.append(process)
    return ran


def test_sides_alternate():
    sides = [side for _, side in order(3)]
    assert sides == ["baseline", "llmir", "llmir", "baseline", "baseline", "llmir"]


def test_without_a_budget_one_framework_follows_the_other(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=2), options(framework="sglang", pairs=1)], clock=clock)
    assert schedule.total() == 6
    assert schedule.allotted(Process(0, 0, "baseline")) is None
    ran = run(schedule, clock, {"ready": 1e6})
    assert [(process.framework, process.pair) for process in ran] == [(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0)]


def test_with_a_budget_first_pairs_come_first_and_further_ones_in_turns(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=3), options(framework="sglang", pairs=2)], 1e6, clock)
    ran = run(schedule, clock, {"ready": 1.0, "smoke": 1.0})
    assert [(process.framework, process.pair) for process in ran[::2]] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]


def test_a_further_pair_runs_only_if_it_fits(options: Options, clock: Clock):
    # A pair takes 40 s, its quality 20 s more: 60 + 40 fit into 100 s, and not into 99 s.
    for budget, pairs in ((100.0, 2), (99.0, 1)):
        schedule = Schedule([options(pairs=3)], budget, clock)
        ran = run(schedule, clock, {"ready": 10.0, "smoke": 10.0, "quality": 10.0}, processes=2)
        assert schedule.total() == 2 * pairs
        ran += run(schedule, clock, {"ready": 10.0, "smoke": 10.0})
        assert len(ran) == schedule.finished == 2 * pairs


def test_where_a_slow_framework_no_longer_fits_a_quick_one_still_may(options: Options, clock: Clock):
    schedule = Schedule([options(framework="sglang", pairs=2), options(pairs=2)], 100.0, clock)
    run(schedule, clock, {"ready": 20.0, "smoke": 20.0}, processes=2)
    run(schedule, clock, {"ready": 1.0, "smoke": 1.0}, processes=2)
    assert [process.framework for process in run(schedule, clock, {"ready": 1.0, "smoke": 1.0})] == [1, 1]


def test_the_first_process_of_each_framework_is_allotted_a_share_of_what_remains(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=2), options(framework="sglang", pairs=2)], 400.0, clock)
    shares = []
    while (process := schedule.next()) is not None:
        shares.append(schedule.allotted(process))
        schedule.begin(process)
        clock.now += 60.0
        schedule.done("ready")
        schedule.end()
    assert shares[:4] == [100.0, None, 140.0, None]
    assert set(shares[4:]) <= {None}


def test_a_spent_budget_allots_nothing(options: Options, clock: Clock):
    schedule = Schedule([options()], 10.0, clock)
    clock.now += 20.0
    process = schedule.next()
    assert process is not None
    assert schedule.allotted(process) == 0.0


def test_what_has_never_run_is_not_guessed(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=1), options(framework="sglang", pairs=1)], clock=clock)
    process = schedule.next()
    assert process is not None
    schedule.begin(process)
    assert schedule.left() == Left(0.0, complete=False)
    clock.now += 30.0
    schedule.done("ready")
    # The other side's start is expected to take as long; nothing is known of workload, quality and SGLang.
    assert schedule.left() == Left(30.0, complete=False)


def test_everything_is_expected_to_take_as_long_as_the_last_time(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=2)], clock=clock)
    run(schedule, clock, {"ready": 100.0, "smoke": 10.0, "quality": 5.0}, processes=1)
    assert schedule.left() == Left(115.0 + 2 * 110.0, complete=True)
    run(schedule, clock, {"ready": 50.0, "smoke": 4.0, "quality": 5.0}, processes=1)
    assert schedule.left() == Left(54.0 + 110.0, complete=True)


def test_a_running_step_has_taken_some_of_its_time(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=1, quality=False)], clock=clock)
    run(schedule, clock, {"ready": 20.0, "smoke": 10.0}, processes=1)
    process = schedule.next()
    assert process is not None
    schedule.begin(process)
    clock.now += 5.0
    assert schedule.left() == Left(25.0, complete=True)
    clock.now += 100.0
    assert schedule.left() == Left(10.0, complete=True)


def test_what_is_left_out_is_not_waited_for(options: Options, clock: Clock):
    schedule = Schedule([options(workloads=("smoke", "long"), pairs=1, quality=False)], 60.0, clock)
    run(schedule, clock, {"ready": 20.0, "smoke": 10.0}, processes=1)
    assert not schedule.left().complete
    schedule.leave_out(0, ["long"])
    assert schedule.left() == Left(30.0, complete=True, at_most=30.0)


def test_a_budget_is_the_most_that_is_left(options: Options, clock: Clock):
    schedule = Schedule([options(pairs=1)], 600.0, clock)
    clock.now += 60.0
    assert schedule.left().at_most == 540.0
    clock.now += 6000.0
    assert schedule.left().at_most == 0.0


@pytest.mark.parametrize(
    ("left", "text"),
    [
        (Left(0.0, complete=False), ""),
        (Left(200.0, complete=False), "more than 3 min left"),
        (Left(200.0, complete=False, at_most=1260.0), "3 to 21 min left"),
        (Left(10.0, complete=False, at_most=1260.0), "up to 21 min left"),
        (Left(200.0, complete=False, at_most=100.0), "more than 3 min left"),
        (Left(200.0, complete=True, at_most=1260.0), "about 3 min left"),
        (Left(20.0, complete=True, at_most=math.inf), "less than a minute left"),
    ],
)
def test_what_is_left_in_words(left: Left, text: str):
    assert str(left) == text
