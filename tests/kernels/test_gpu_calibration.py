"""The arithmetic of a GPU's figures, with a probe that knows how fast it is. Nothing here runs on a GPU."""

from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest

from llmir.errors import KernelError
from llmir.kernels.gpu import calibration
from llmir.kernels.gpu.calibration import PIECES, WORKING_SETS, calibrate, figures
from llmir.targets.machine import Target

GPU = replace(Target.named("cuda:sm_90"), name="gpu", model="Test GPU", cores=4)


class Known:
    """A GPU that streams 1 GB/s with one thread block and 4 GB/s with many, multiplies and waits as it says."""

    free_bytes = 1 << 28

    def __init__(self):
        self.reads = []

    def read(self, places, part, programs):
        self.reads.append((places, part, programs))
        return places.size * part * 4 / (1e9 if programs == 1 else 4e9)

    def product(self, element_type, size):
        return 2 * size**3 / {"bfloat16": 8e12, "float32": 1e12}[element_type]

    def access(self, links, link_bytes, steps):
        return 5e-7

    def launch(self, launches):
        return 3e-6


def test_figures_are_what_the_probe_times():
    found = figures(GPU, Known())
    assert found.read_bandwidth == pytest.approx(1e9) and found.read_bandwidth_all == pytest.approx(4e9)
    assert (found.fork_join_seconds, found.latency_seconds) == (3e-6, 5e-7)
    assert found.origin == "measured on this Test GPU"


def test_products_are_of_one_sm():
    found = figures(GPU, Known())
    assert (found.bf16_rate, found.f32_rate) == (pytest.approx(2e12), pytest.approx(0.25e12))
    assert found.threads == 4


def test_pieces_and_working_sets_are_all_measured():
    found = figures(GPU, Known())
    assert tuple(size for size, _ in found.piece_bandwidth) == PIECES
    assert tuple(size for size, _ in found.cached_bandwidth) == WORKING_SETS


def test_memory_is_a_part_of_what_is_free():
    probe = Known()
    figures(GPU, probe)
    furthest = max(int(places.max()) + part for places, part, _ in probe.reads[: len(PIECES)]) * 4
    assert furthest <= Known.free_bytes / 4


@pytest.mark.parametrize("piece", PIECES)
def test_pieces_lie_whole_and_once_in_random_order(piece):
    places, part = calibration._places(piece, 1 << 21, 1 << 21)
    assert np.array_equal(np.sort(places), np.arange(0, 1 << 19, part))
    pieces = places.reshape(-1, piece // 4 // part)
    assert np.all(np.diff(pieces, axis=1) == part)
    assert len(pieces) == 1 or not np.array_equal(pieces[:, 0], np.sort(pieces[:, 0]))


def test_a_working_set_is_read_again_until_it_is_enough():
    places, part = calibration._places(16 << 10, 1 << 16, 1 << 20)
    assert places.size * part * 4 == 1 << 20 and places.max() * 4 < 1 << 16


@pytest.fixture
def own_gpu(monkeypatch):
    monkeypatch.setattr(Target, "named", lambda name: GPU)


def test_a_gpu_is_measured_once(own_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_Gpu", Known)
    first = calibrate(GPU, tmp_path)
    monkeypatch.setattr(calibration, "_Gpu", lambda: pytest.fail("measured again"))
    assert calibrate(GPU, tmp_path).measured == first.measured


def test_a_failed_measurement_is_told_twice_and_then_made(own_gpu, tmp_path, monkeypatch):
    def fail():
        raise KernelError("no memory")

    monkeypatch.setattr(calibration, "_Gpu", fail)
    with pytest.raises(KernelError, match="no memory") as first:
        calibrate(GPU, tmp_path)
    with pytest.raises(KernelError, match="no memory"):
        calibrate(GPU, tmp_path)
    monkeypatch.setattr(calibration, "_Gpu", Known)
    assert calibrate(GPU, tmp_path).measured is not None, first


@pytest.mark.parametrize("distribution", ["triton", "torch"])
def test_a_gpu_is_measured_anew_with_other_software(own_gpu, tmp_path, monkeypatch, distribution):
    versions = {"triton": "3.7.0", "torch": "2.13.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    monkeypatch.setattr(calibration, "_Gpu", Known)
    calibrate(GPU, tmp_path)
    versions[distribution] = "4"
    calibrate(GPU, tmp_path)
    assert len(list(tmp_path.glob("*/*.calibration.json"))) == 2


def test_another_gpu_cannot_be_measured_from_here(own_gpu):
    with pytest.raises(KernelError, match=r"hip:gfx942 .* cannot be measured from here \(cuda-sm_90\)"):
        calibrate(Target.from_json({**GPU.to_json(), "name": "hip:gfx942", "isa": "gfx942", "machine": "hip"}))


def test_a_torch_without_a_gpu_is_an_error_that_says_what_to_do(own_gpu, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match="cannot use this machine's GPU: install torch for CUDA or ROCm"):
        calibrate(GPU)


def test_the_reading_program_reads_every_element_once():
    torch, measuring = pytest.importorskip("torch"), pytest.importorskip("llmir.kernels.gpu.measuring")
    places, part = calibration._places(128, 1 << 16, 1 << 16)
    memory, sums = torch.arange(1 << 14, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    parts = calibration._TILE // 4 // part
    tiles = len(places) // parts
    measuring.read_tiles[(3,)](memory, torch.from_numpy(places), sums, tiles, PARTS=parts, PART=part)
    assert int(sums.sum()) == int(memory.sum())


def test_the_chasing_program_follows_every_link():
    torch, measuring = pytest.importorskip("torch"), pytest.importorskip("llmir.kernels.gpu.measuring")
    chain, end = torch.tensor([3, 2, 0, 1]), torch.zeros(1, dtype=torch.int64)
    found = []
    for steps in (1, 2, 3, 4):
        measuring.chase[(1,)](chain, end, steps)
        found.append(int(end))
    assert found == [3, 1, 2, 0]
