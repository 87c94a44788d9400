"""GPUs as targets: published figures, and detection through a driver that a test stands in for."""

import ctypes
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from llmir.targets import registry
from llmir.targets.cuda.driver import LIBRARY
from llmir.targets.gpu import detection
from llmir.targets.gpu.detection import detect, look
from llmir.targets.hip.driver import NODES
from llmir.targets.machine import Target
from llmir.targets.records import Cache, TargetError

NAMES = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")
H100 = Target.named("cuda:sm_90")


@pytest.mark.parametrize("name", NAMES)
def test_named_gpus_say_that_their_figures_are_published(name):
    target = Target.named(name)
    assert target.isa == name.split(":")[1] and target.measured is None
    assert target.figures.origin == f"published for {target.model}, not measured"


def test_every_gpu_that_kernels_are_made_for_is_a_target():
    assert {name.split(":")[1] for name in NAMES} == set(registry.isas(on_gpu=True))


@pytest.mark.parametrize(("name", "fingerprint"), [("cuda:sm_90", "cuda-sm_90"), ("hip:gfx942", "hip-gfx942")])
def test_the_fingerprint_of_a_gpu_is_its_architecture(name, fingerprint):
    assert Target.named(name).fingerprint == fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_the_rates_of_all_units_are_those_of_the_chip(name):
    figures = Target.named(name).figures
    tera = {"cuda:sm_80": 312, "cuda:sm_90": 989.4, "cuda:sm_100": 2250, "hip:gfx942": 1307.4}[name]
    assert figures.bf16_rate * figures.threads == pytest.approx(tera * 1e12)


@pytest.mark.parametrize("name", NAMES)
def test_what_was_just_read_comes_faster_than_memory_streams(name):
    target = Target.named(name)
    rates = [rate for _, rate in target.figures.cached_bandwidth]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    assert rates[-1] == pytest.approx(target.figures.read_bandwidth_all)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_any_size_stream_because_so_much_is_on_its_way(name):
    figures = Target.named(name).figures
    rates = [figures.piece_rate(size) for size in (64, 4096, 1 << 20)]
    assert rates == pytest.approx([figures.read_bandwidth_all] * 3)


def test_pieces_smaller_than_an_access_waste_the_rest_of_it():
    assert H100.figures.piece_rate(32) <= H100.figures.piece_rate(64)


def test_a_gpu_tells_what_shared_memory_a_thread_block_may_use():
    limits = {name: Target.named(name).shared_memory >> 10 for name in NAMES}
    assert limits == {"cuda:sm_80": 163, "cuda:sm_90": 227, "cuda:sm_100": 227, "hip:gfx942": 64}
    assert Target.named("cpu:avx2").shared_memory == 0


def test_a_cpu_does_not_run_what_is_compiled_for_a_gpu():
    assert not H100.runs_on(Target.detect()) and not Target.detect().runs_on(H100)


def test_a_gpu_runs_what_is_compiled_for_its_architecture():
    assert H100.runs_on(replace(H100, name="gpu", model="H200", cores=114))
    assert not H100.runs_on(Target.named("cuda:sm_80"))


def test_a_gpu_survives_json():
    assert Target.from_json(json.loads(json.dumps(H100.to_json()))) == H100


# -- detection


class Driver:
    """A CUDA driver that knows one GPU by its attributes, or none."""

    def __init__(self, name=b"NVIDIA H100 PCIe", capability=(9, 0), count=1, status=0):
        self.name, self.count, self.status = name, count, status
        self.attributes = {16: 114, 38: 50 << 20, 75: capability[0], 76: capability[1], 81: 228 << 10, 97: 227 << 10}

    def load(self, library):
        assert library == LIBRARY
        return self

    def cuInit(self, _flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, device, number):
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name, size, _device):
        ctypes.memmove(name, self.name, min(size, len(self.name)))
        return 0

    def cuDeviceGetAttribute(self, value, attribute, _device):
        value._obj.value = self.attributes[attribute]
        return 0


def no_driver(_library):
    raise OSError("no such file")


def node(root, number, **properties):
    """A processor as the amdgpu driver shows it."""
    folder = root / NODES / str(number)
    folder.mkdir(parents=True)
    (folder / "properties").write_text("".join(f"{name} {value}\n" for name, value in properties.items()))


def test_an_nvidia_gpu_is_what_its_driver_says(tmp_path):
    found = look(tmp_path, Driver().load)
    assert (found.isa, found.machine, found.model, found.cores) == ("sm_90", "cuda", "NVIDIA H100 PCIe", 114)
    assert found.caches == (Cache(1, 228 << 10, 1), Cache(2, 50 << 20, 114))
    assert found.shared_memory == 227 << 10


def test_an_amd_gpu_is_the_first_node_with_simd_units(tmp_path):
    node(tmp_path, 0, cpu_cores_count=96, simd_count=0)
    node(tmp_path, 10, simd_count=8, simd_per_cu=4, gfx_target_version=90402)
    node(tmp_path, 2, simd_count=1216, simd_per_cu=4, gfx_target_version=90402)
    found = look(tmp_path, no_driver)
    assert (found.isa, found.machine, found.cores, found.shared_memory) == ("gfx942", "hip", 304, 64 << 10)


def test_gpu_is_this_machines(monkeypatch):
    monkeypatch.setattr(detection, "find", lambda: look(load=Driver().load))
    target = Target.named("gpu")
    assert (target.name, target.fingerprint, target.figures.threads) == ("gpu", "cuda-sm_90", 114)


def test_fewer_units_multiply_less_and_share_one_memory(tmp_path):
    found = Target(name="gpu", **vars(look(tmp_path, Driver().load))).figures
    assert found.bf16_rate == H100.figures.bf16_rate and found.read_bandwidth_all == H100.figures.read_bandwidth_all


@pytest.mark.parametrize("load", [no_driver, Driver(count=0).load, Driver(status=100).load])
def test_where_there_is_no_gpu_none_is_found(tmp_path, load):
    assert look(tmp_path, load) is None


def test_where_there_is_no_gpu_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(detection, "find", lambda: None)
    with pytest.raises(TargetError, match=r"no GPU was found here.*install the GPU's driver.*cuda:sm_90"):
        detect()


@pytest.fixture
def with_driver(monkeypatch):
    """A process that can load a CUDA driver, but not what it would show."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)


def answered(monkeypatch, **result):
    """Let the process that asks the driver end so."""
    done = subprocess.CompletedProcess([], **{"returncode": 0, "stdout": "", "stderr": "", **result})
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)


def test_the_driver_is_asked_in_another_process(monkeypatch, capsys, with_driver):
    monkeypatch.setattr(detection, "look", lambda: look(load=Driver().load))
    detection.main()
    answered(monkeypatch, stdout=capsys.readouterr().out)
    assert detection.find() == look(load=Driver().load)


def test_what_is_wrong_with_the_gpu_comes_from_that_process(monkeypatch, with_driver):
    answered(monkeypatch, returncode=1, stderr="a warning\nNVIDIA L4 is sm_89\n")
    with pytest.raises(TargetError, match=r"^NVIDIA L4 is sm_89$"):
        detection.find()


def test_the_process_that_asks_is_this_module():
    done = subprocess.run([sys.executable, "-m", detection.__name__], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is None or "isa" in json.loads(done.stdout)


def test_a_gpu_without_kernels_is_named(tmp_path):
    with pytest.raises(TargetError, match=r"NVIDIA L4 is sm_89, and there are kernels for sm_80, sm_90"):
        look(tmp_path, Driver(b"NVIDIA L4", (8, 9)).load)
    node(tmp_path, 1, simd_count=440, simd_per_cu=4, gfx_target_version=90010)
    with pytest.raises(TargetError, match="is gfx90a"):
        look(tmp_path, no_driver)
