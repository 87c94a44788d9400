"""Compiling ahead of time: what comes out, and what is said where nothing can."""

import pickle
from dataclasses import replace

import pytest
from ahead_cases import spec_of

from llmir.errors import KernelError
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.gpu import ahead, ahead_worker, programs, toolchain
from llmir.kernels.gpu.ahead import compile_ahead, jobs
from llmir.kernels.gpu.manifest import file_name, manifest

#: What Triton 3.7.1 adds to a function's parameters.
SCRATCH = ["global_scratch", "profile_scratch"]


def test_a_kernel_s_jobs_are_its_programs():
    spec = spec_of()
    assert [job.program for job in jobs(spec)] == [program.name for program in programs.programs(spec)]


def test_parameters_are_those_of_the_program_and_triton_s_own(binaries):
    spec = spec_of(sinks=True, quantized=True)
    for program in programs.programs(spec):
        found = [(p.name, p.type) for p in binaries(spec)[program.name].parameters]
        assert found[: -len(SCRATCH)] == list(program.types.items())
        assert [name for name, _ in found[-len(SCRATCH) :]] == SCRATCH


def test_parameters_lie_one_after_the_other(binaries):
    for binary in binaries(spec_of()).values():
        ends = [p.offset + p.bytes for p in binary.parameters]
        starts = [p.offset for p in binary.parameters]
        assert starts[0] == 0
        assert all(end <= start < end + 8 for end, start in zip(ends, starts[1:], strict=False))


@pytest.mark.parametrize(
    ("isa", "magic", "suffix"), [("sm_90", b"\x7fELF", ".cubin"), ("gfx942", b"\x7fELF", ".hsaco")]
)
def test_binaries_are_elf_files(binaries, isa, magic, suffix):
    for binary in binaries(spec_of(isa)).values():
        assert binary.content.startswith(magic)
        assert binary.suffix == suffix


def test_binaries_do_not_name_folders_of_this_machine(binaries):
    for binary in binaries(spec_of()).values():
        assert b"llmir/kernels" not in binary.content


def test_threads_are_warps_of_the_architecture(binaries):
    assert {name: b.threads // b.warps for name, b in binaries(spec_of()).items()} == dict.fromkeys(
        ("append", "decode", "prefill", "merge"), 32
    )
    assert binaries(spec_of("gfx942"))["decode"].threads == 64 * binaries(spec_of("gfx942"))["decode"].warps


def test_the_manifest_names_each_binary_s_file_and_release_of_triton(binaries):
    spec = spec_of()
    made = binaries(spec)
    record = manifest({"kernel": tuple(made.values())})
    assert (record["architecture"], record["triton"]) == ("sm_90", toolchain.installed())
    assert {name: entry["file"] for name, entry in record["kernels"]["kernel"].items()} == {
        name: file_name("kernel", binary) for name, binary in made.items()
    }


def test_the_manifest_says_what_a_launch_needs(binaries):
    binary = binaries(spec_of())["prefill"]
    entry = manifest({"kernel": (binary,)})["kernels"]["kernel"]["prefill"]
    assert (entry["entry"], entry["threads"], entry["shared_bytes"]) == ("attend", binary.threads, binary.shared_bytes)
    assert entry["parameters"][0] == {"name": "query", "type": "*bf16", "offset": 0, "bytes": 8}
    assert entry["scratch_bytes"] == 0


def test_without_triton_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "installed", lambda: None)
    with pytest.raises(KernelError, match=r"Triton, which is not installed: install one from 3\.6"):
        compile_ahead([spec_of()], tmp_path)


@pytest.mark.parametrize("release", ["3.5.1", "3.10.0", "4.0"])
def test_releases_that_the_kernels_never_met_are_refused(monkeypatch, release):
    monkeypatch.setattr(toolchain, "installed", lambda: release)
    with pytest.raises(KernelError, match=f"never compiled with Triton {release}"):
        toolchain.require()


@pytest.mark.parametrize("release", ["3.6.0", "3.7.1", "3.9.0", "3.7.0+rocm7.1"])
def test_releases_that_the_kernels_met_are_taken(monkeypatch, release):
    monkeypatch.setattr(toolchain, "installed", lambda: release)
    assert toolchain.require() == release


def test_an_architecture_of_a_cpu_is_refused(tmp_path):
    with pytest.raises(KernelError, match="no kernels for a GPU architecture 'avx512'"):
        compile_ahead([replace(spec_of(), isa="avx512")], tmp_path)


def test_what_has_no_program_is_refused_by_kernel_and_reason(triton_cache):
    with pytest.raises(KernelError, match=r"attention_32x8x128_f32_block32 has no GPU program: .*queries of f32"):
        compile_ahead([spec_of(dtype="f32")], triton_cache)


def test_a_type_that_an_architecture_does_not_have_is_refused_by_kernel_and_reason(triton_cache):
    with pytest.raises(KernelError, match=r"attention_\S+_fp8 has no GPU program: .*f8E4M3FN has no kernel on sm_80"):
        compile_ahead([spec_of("sm_80", quantized=True)], triton_cache)


def test_what_does_not_fit_the_gpu_is_refused_with_its_needs(triton_cache):
    spec = spec_of("gfx942")
    large = replace(spec.variant("prefill"), row_tile=128, max_tokens=32, key_chunk=128, warps=8, stages=3)
    with pytest.raises(KernelError, match=r"does not fit gfx942: .* bytes of shared memory of 65536"):
        compile_ahead([KernelSpec(spec.attention, "gfx942", (large,))], triton_cache)


def test_a_compiler_that_crashes_is_named_with_what_it_was_at(monkeypatch, tmp_path):
    monkeypatch.setattr(ahead, "WORKER", "llmir.kernels.gpu.no_such_module")
    with pytest.raises(KernelError, match=r"ended with status 1 on \w+ of attention_32x8x128"):
        compile_ahead([spec_of()], tmp_path)


def test_the_interpreter_stays_out_of_processes_that_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    environment = toolchain.environment(tmp_path)
    assert "TRITON_INTERPRET" not in environment
    assert environment["TRITON_CACHE_DIR"] == str(tmp_path / "triton")


def test_any_error_of_the_compiler_comes_back_as_one_sentence(monkeypatch):
    def fail(job):
        raise ValueError("at 3:4\n\nthis is wrong")

    monkeypatch.setattr(ahead_worker, "build", fail)
    error = pickle.loads(pickle.dumps(ahead_worker._outcome(jobs(spec_of("sm_100"))[1])))
    assert isinstance(error, KernelError)
    assert "decode of attention_32x8x128_bf16_block32 does not compile for sm_100" in str(error)
    assert "(ValueError: this is wrong)" in str(error)
