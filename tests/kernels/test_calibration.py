"""Calibration: that it measures what it says, once a machine, and only its own."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from llmir.errors import KernelError
from llmir.kernels import calibration_cache
from llmir.kernels.cpu import calibration
from llmir.kernels.cpu.calibration import PIECES, calibrate
from llmir.targets.machine import Target


@pytest.fixture
def small(monkeypatch):
    """Measures on little memory, few times: these tests do not look at the speeds."""
    pytest.importorskip("torch")  # brings the OpenMP runtime
    monkeypatch.setattr(calibration, "_LEAST_MEMORY", 2 << 20)
    monkeypatch.setattr(calibration, "_MEMORY_CACHES", 0)
    monkeypatch.setattr(calibration, "WORKING_SETS", (128 << 10, 512 << 10))
    monkeypatch.setattr(calibration, "_READ_AGAIN", 1 << 20)
    monkeypatch.setattr(calibration, "_PRODUCT_ITERATIONS", 1000)
    monkeypatch.setattr(calibration, "_FORK_JOIN_REPEATS", 3)


def test_every_figure_is_measured(small):
    target = calibrate(Target.detect())
    assert target == Target.detect()
    assert [piece for piece, _ in target.measured.piece_bandwidth] == list(PIECES)
    assert [size for size, _ in target.measured.cached_bandwidth] == list(calibration.WORKING_SETS)
    assert "measured on this" in target.measured.origin


def test_reading_is_repeated_until_the_two_best_agree():
    rates = iter([[5.0, 7.0], [9.0, 9.9], [4.0, 10.0], [9.5, 3.0], [6.0, 6.0], [9.99, 5.0], [10.0, 5.0]])
    rows: list[float] = []

    def read(_threads: int) -> float:
        if not rows:
            rows.extend(next(rates))
        return rows.pop(0)

    best, error = calibration._best([read, read], 2)
    assert best == [10.0, 10.0] and error == pytest.approx(0.01)
    assert next(rates, None) is None


def test_what_never_agrees_says_how_far_it_is_apart(monkeypatch):
    numbers = iter(range(1, 1000))
    best, error = calibration._best([lambda _: 2.0 ** next(numbers)], 2)
    assert error == 0.5 and best == [2.0**calibration._MOST_REPEATS]


def test_one_slow_start_of_threads_leaves_a_possible_time(small, monkeypatch):
    kernels = calibration._Kernels(Target.detect())
    times = iter([2e-6, 3e-6, 5e-3])
    monkeypatch.setattr(kernels, "_seconds", lambda *args: next(times))
    assert 2e-6 <= kernels.fork_join_seconds() <= 3e-6


def test_machine_is_measured_once(small, tmp_path, monkeypatch):
    first = calibrate(Target.detect(), tmp_path)
    monkeypatch.setattr(calibration, "_measure", lambda target: pytest.fail("measured again"))
    assert calibrate(Target.detect(), tmp_path).measured == first.measured


def test_a_failed_measurement_is_told_twice_and_then_made(tmp_path, monkeypatch):
    def fail(target):
        raise KernelError("no such instruction")

    monkeypatch.setattr(calibration, "_measure", fail)
    with pytest.raises(KernelError, match="no such instruction") as first:
        calibrate(Target.detect(), tmp_path)
    with pytest.raises(KernelError, match="no such instruction"):
        calibrate(Target.detect(), tmp_path)
    figures = Target.named("cpu:avx512").figures
    monkeypatch.setattr(calibration, "_measure", lambda target: figures)
    assert calibrate(Target.detect(), tmp_path).measured == figures, first


@pytest.mark.parametrize(
    ("module", "name"),
    [(calibration_cache, "closure_digest"), (calibration, "bindings_version")],
    ids=["sources", "bindings"],
)
def test_figures_measured_with_another_compiler_are_not_kept(tmp_path, monkeypatch, module, name):
    monkeypatch.setattr(calibration, "_measure", lambda target: Target.named("cpu:avx512").figures)
    calibrate(Target.detect(), tmp_path)
    monkeypatch.setattr(module, name, lambda *args: "another")
    calibrate(Target.detect(), tmp_path)
    assert len(list(tmp_path.glob("*/*.calibration.json"))) == 2


def test_other_configuration_is_measured_anew(small, tmp_path):
    target = Target.detect()
    calibrate(target, tmp_path)
    calibrate(dataclasses.replace(target, cores=target.cores + 1), tmp_path)
    assert len(list(tmp_path.glob("*/*.calibration.json"))) == 2


def test_another_machine_cannot_be_measured_from_here():
    other = dataclasses.replace(Target.detect(), features=("another",), isa="avx2")
    with pytest.raises(KernelError, match="cannot be measured from here"):
        calibrate(other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("piece", [None, 1024, 4096, 65536])
def test_every_byte_is_read_once(small, threads, piece):
    kernels = calibration._Kernels(dataclasses.replace(Target.detect(), cores=2))
    words = kernels.memory.view(np.uint32)
    words[:] = np.random.default_rng(0).integers(0, 2**32, words.size, np.uint32)
    (kernels.pages(piece) if piece else kernels.stream)(threads)
    lanes = kernels.results.view(np.uint32).reshape(2, -1)[:threads].sum(dtype=np.uint32)
    assert lanes == words.sum(dtype=np.uint32)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("set_bytes", "times"), [(128 << 10, 8), (512 << 10, 2), (1 << 20, 2)])
def test_a_working_set_is_read_again_and_again_and_nothing_else(small, threads, set_bytes, times):
    kernels = calibration._Kernels(dataclasses.replace(Target.detect(), cores=2))
    words = kernels.memory.view(np.uint32)
    words[:] = np.random.default_rng(0).integers(0, 2**32, words.size, np.uint32)
    kernels.working_set(set_bytes)(threads)
    lanes = kernels.results.view(np.uint32).reshape(2, -1)[:threads].sum(dtype=np.uint32)
    assert int(lanes) == times * int(words[: set_bytes // 4].sum(dtype=np.uint64)) % 2**32


def test_without_an_openmp_runtime_the_remedy_is_named():
    code = "import llmir.kernels.cpu.calibration as c; from llmir.targets.machine import Target"
    code += "; c.calibrate(Target.detect())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "import torch first" in result.stderr
