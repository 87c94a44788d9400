import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmir.targets.machine import Target
from llmir.targets.records import Cache, Measurements, TargetError
from llmir.targets.x86.isa import INSTRUCTION_SETS

MEASURED = Measurements(
    read_bandwidth=16e9,
    read_bandwidth_all=30e9,
    piece_bandwidth=((4096, 7e9), (65536, 14e9)),
    cached_bandwidth=((1 << 17, 120e9), (1 << 26, 30e9)),
    bf16_rate=2e11,
    f32_rate=1e11,
    fork_join_seconds=1e-5,
    threads=2,
    origin="measured in a test",
)


def machine(root: Path, flags: str, cores: int = 2) -> Path:
    """A folder that looks like /proc and /sys of a machine with these CPU flags."""
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Test CPU 9000\nflags\t\t: {flags}\n\n")
    for cpu in range(64):  # whichever of them this process may run on
        folder = root / f"sys/devices/system/cpu/cpu{cpu}"
        for index, (level, kind, size, sharers) in enumerate(
            [
                (1, "Data", "32K", "0"),
                (1, "Instruction", "32K", "0"),
                (2, "Unified", "1M", "0"),
                (3, "Unified", "32M", "0-3,8"),
            ]
        ):
            cache = folder / f"cache/index{index}"
            cache.mkdir(parents=True)
            for name, value in (("level", level), ("type", kind), ("size", size), ("shared_cpu_list", sharers)):
                (cache / name).write_text(f"{value}\n")
        (folder / "topology").mkdir()
        (folder / "topology/core_id").write_text(f"{cpu % cores}\n")
        (folder / "topology/physical_package_id").write_text("0\n")
    return root


def test_detect_reads_caches_without_the_instruction_cache(tmp_path):
    target = Target.detect(machine(tmp_path, "avx2"))
    assert target.caches == (Cache(1, 32 << 10, 1), Cache(2, 1 << 20, 1), Cache(3, 32 << 20, 5))
    assert (target.cache_bytes(2), target.cache_bytes(4)) == (1 << 20, 0)


def test_detect_reads_the_model(tmp_path):
    assert Target.detect(machine(tmp_path, "avx2")).model == "Test CPU 9000"


def test_hyperthreads_of_a_core_count_once(tmp_path):
    assert Target.detect(machine(tmp_path, "avx2", cores=1)).cores == 1


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_detect_chooses_the_best_instruction_set(tmp_path, isa):
    flags = " ".join({"sse2", "avx2", *INSTRUCTION_SETS[isa].features})
    assert Target.detect(machine(tmp_path, flags)).isa == isa


def test_half_of_avx512_is_not_avx512(tmp_path):
    assert Target.detect(machine(tmp_path, "avx2 fma f16c avx512f avx512_bf16")).isa == "avx2"


def test_a_machine_that_tells_nothing_has_no_kernels(tmp_path):
    target = Target.detect(tmp_path)
    assert (target.isa, target.caches, target.cores >= 1) == ("none", (), True)


def test_what_a_processor_lacks_is_named(tmp_path):
    old = Target.detect(machine(tmp_path, "sse4_2 avx f16c"))
    assert "with avx2, f16c, fma, and this one (Test CPU 9000, x86_64) lacks avx2, fma:" in old.missing()
    with pytest.raises(TargetError, match="lacks avx2, fma"):
        old.figures  # noqa: B018


def test_another_architecture_is_named(tmp_path):
    arm = replace(Target.detect(machine(tmp_path, "")), machine="aarch64")
    assert "this one (Test CPU 9000, aarch64) is another kind" in arm.missing()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_machine_with_kernels_lacks_nothing(isa):
    assert Target.named(f"cpu:{isa}").missing() == ""


def test_flags_that_change_no_code_do_not_change_the_fingerprint(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    a = Target.detect(machine(tmp_path / "a", "avx2 fma hypervisor"))
    b = Target.detect(machine(tmp_path / "b", "fma avx2 ibpb"))
    assert a.fingerprint == b.fingerprint


def test_a_feature_that_no_kernel_uses_does_not_change_the_fingerprint():
    target = Target.named("cpu:avx512")
    assert replace(target, features=(*target.features, "gfni")).fingerprint == "x86_64-avx512" == target.fingerprint


def test_a_machine_runs_the_kernels_of_all_lesser_instruction_sets():
    assert Target.named("cpu:avx512").runnable == ("x86_64-avx512", "x86_64-avx2")
    assert Target.named("cuda:sm_90").runnable == ("cuda-sm_90",)


def test_a_machine_can_be_used_with_a_lesser_instruction_set():
    best = Target.named("cpu:avx512_bf16")
    assert best.with_isa("avx2") == replace(best, isa="avx2")
    with pytest.raises(TargetError, match=r"cannot run sm_90: choose from avx512_bf16, avx512, avx2"):
        best.with_isa("sm_90")


def test_measuring_does_not_change_the_fingerprint():
    target = Target.named("cpu:avx512")
    assert target.with_measurements(MEASURED).fingerprint == target.fingerprint


def test_a_lesser_instruction_set_runs_on_a_better_machine():
    least, best = Target.named("cpu:avx2"), Target.named("cpu:avx512_bf16")
    assert least.runs_on(best) and not best.runs_on(least)


def test_another_architecture_runs_nothing():
    least = Target.named("cpu:avx2")
    assert not least.runs_on(replace(least, machine="aarch64"))


def test_cpu_is_this_machine():
    assert Target.named("cpu") == Target.detect()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_named_targets_say_that_their_figures_are_published(isa):
    target = Target.named(f"cpu:{isa}")
    assert target.isa == isa and target.measured is None
    assert target.figures.origin.startswith("published for ")


def test_measured_figures_win_over_published_ones():
    assert Target.named("cpu:avx2").with_measurements(MEASURED).figures is MEASURED


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        TargetError,
        match="no target 'cuda:sm_75'; use one of cpu, gpu, cpu:avx2, cpu:avx512, cpu:avx512_bf16, cuda:sm",
    ):
        Target.named("cuda:sm_75")


@pytest.mark.parametrize("measured", [None, MEASURED])
def test_json_round_trip(measured):
    target = replace(Target.detect(), measured=measured)
    again = Target.from_json(json.loads(json.dumps(target.to_json())))
    assert again == target and again.measured == measured


@pytest.mark.parametrize("data", [{}, [], None, {"name": "cpu"}, {**Target.named("cpu:avx2").to_json(), "extra": 1}])
def test_other_json_is_a_target_error(data):
    with pytest.raises(TargetError):
        Target.from_json(data)


@pytest.mark.parametrize("curve", ["piece_bandwidth", "cached_bandwidth"])
@pytest.mark.parametrize("points", [((65536, 1.0), (4096, 1.0)), ((4096, 1.0), (4096, 1.0)), ((0, 1.0),), ()])
def test_measured_sizes_must_ascend(curve, points):
    with pytest.raises(TargetError, match=f"{curve} needs ascending sizes"):
        replace(MEASURED, **{curve: points})


@pytest.mark.parametrize("figure", [{"bf16_rate": 0.0}, {"cached_bandwidth": ((4096, 0.0),)}])
def test_a_rate_of_zero_is_no_measurement(figure):
    with pytest.raises(TargetError, match="positive"):
        replace(MEASURED, **figure)


@given(st.integers(64, 1 << 22))
def test_the_rate_of_a_piece_lies_between_the_measured_ones(piece):
    rate = MEASURED.piece_rate(piece)
    assert 0 < rate <= 14e9
    assert rate >= 7e9 * 0.999 or piece < 4096


@given(st.integers(64, 1 << 22), st.integers(64, 1 << 22))
def test_larger_pieces_are_never_slower_where_measurements_say_so(a, b):
    small, large = sorted((a, b))
    assert MEASURED.piece_rate(small) <= MEASURED.piece_rate(large) * (1 + 1e-12)


def test_no_piece_is_read_faster_than_memory_streams():
    assert replace(MEASURED, read_bandwidth_all=10e9).piece_rate(65536) == 10e9


def test_published_pieces_are_read_by_as_many_threads_as_there_are_cores():
    whole = Target.named("cpu:avx2")
    few = replace(whole, cores=2).figures
    assert few.piece_rate(4096) == pytest.approx(
        min(whole.figures.piece_bandwidth[0][1] / 64 * 2, 2 * few.read_bandwidth)
    )


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_published_working_sets_are_read_faster_the_nearer_they_fit(isa):
    target = Target.named(f"cpu:{isa}")
    rates = dict(target.figures.cached_bandwidth)
    in_second, in_last, in_memory = rates[512 << 10], rates[4 << 20], rates[64 << 20]
    assert in_second > in_last > in_memory == target.figures.read_bandwidth_all


def test_published_caches_are_read_by_as_many_threads_as_there_are_cores():
    whole = Target.named("cpu:avx2")
    few = replace(whole, cores=2).figures
    assert few.cached_bandwidth[0][1] == pytest.approx(whole.figures.cached_bandwidth[0][1] / 32)


def test_the_rate_at_a_measured_size_is_the_measured_one():
    assert MEASURED.piece_rate(4096) == pytest.approx(7e9)
    assert MEASURED.piece_rate(65536) == 14e9
