"""llmir check: what it finds, and what it tells to do."""

import sys
from dataclasses import replace
from importlib import metadata
from types import SimpleNamespace

import pytest

from llmir import kernel_test
from llmir.cli import check as checks
from llmir.cli import frameworks
from llmir.compare import environment
from llmir.errors import KernelError, LlmirError, MissingBindingsError
from llmir.targets.gpu import detection
from llmir.targets.machine import Target
from llmir.targets.records import TargetError


@pytest.fixture(autouse=True)
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "cache"))


def test_fails_if_something_needed_is_missing(run, monkeypatch):
    finding = checks.Finding("a part", "absent", "get one")
    monkeypatch.setattr(checks, "EXAMINATIONS", (lambda: finding,))
    monkeypatch.setattr(checks, "kernels", list)
    code, out, _ = run("check")
    assert code == 1
    assert all(text in out for text in ("missing", "a part", "absent", "get one"))


def test_passes_with_mere_advice(run, monkeypatch):
    finding = checks.Finding("a part", "slow", "get a fast one", needed=False)
    monkeypatch.setattr(checks, "EXAMINATIONS", (lambda: finding,))
    monkeypatch.setattr(checks, "kernels", list)
    monkeypatch.setattr(frameworks, "findings", list)
    code, out, _ = run("check")
    assert code == 0
    assert "advice" in out


@pytest.fixture
def environment_with(monkeypatch):
    """``environment_with(vllm="0.32.0")``: an environment in which these distributions are installed."""

    def make(**installed):
        def version(name):
            if name.replace("-", "_") not in installed:
                raise metadata.PackageNotFoundError(name)
            return installed[name.replace("-", "_")]

        monkeypatch.setattr(metadata, "version", version)

    return make


def test_finds_no_framework(environment_with):
    environment_with()
    (finding,) = frameworks.findings()
    assert finding.failed
    assert all(text in finding.found + finding.remedy for text in ("vLLM", "SGLang", "make .venvs/sglang"))


@pytest.mark.parametrize(
    ("framework", "version", "failed"),
    [
        (frameworks.VLLM, "0.32.0", False),
        (frameworks.VLLM, "0.32.1+cpu", False),
        (frameworks.VLLM, "0.33.0", True),
        (frameworks.VLLM, "0.25.0", True),
        (frameworks.SGLANG, "0.5.23", False),
        (frameworks.SGLANG, "0.5.23.post1", False),
        (frameworks.SGLANG, "0.5.230", True),
    ],
)
def test_wants_the_release_it_is_made_for(environment_with, framework, version, failed):
    environment_with(**{framework.name: version})
    assert frameworks.version(framework).failed == failed


@pytest.mark.parametrize(("gpu", "failed"), [(Target.named("cuda:sm_90"), False), (None, True)])
def test_a_release_served_on_gpus_alone_needs_one(environment_with, monkeypatch, gpu, failed):
    environment_with(vllm="0.29.0")
    monkeypatch.setattr(detection, "find", lambda: gpu)
    finding = frameworks.version(frameworks.VLLM)
    assert finding.failed == failed
    assert finding.found == "vllm 0.29.0, served on a GPU"
    assert finding.remedy == "on a CPU llmir serves 0.32: run make .venvs/vllm"


@pytest.mark.parametrize("framework", frameworks.FRAMEWORKS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize(
    "version", ["0.25.0", "0.26.0", "0.31.2", "0.32.0+cpu", "0.33.0", "0.5.22", "0.5.23", "unknown"]
)
def test_agrees_with_the_frontends(environment_with, monkeypatch, framework, device, version):
    """What a frontend refuses on the machine's device fails, and nothing else."""
    environment_with(**{framework.name: version})
    gpu = Target.named("cuda:sm_90") if device == "gpu" else None
    monkeypatch.setattr(detection, "find", lambda: gpu)
    try:
        framework.versions.check(device)
        refused = False
    except LlmirError:
        refused = True
    assert frameworks.version(framework).failed == refused


@pytest.mark.parametrize("framework", frameworks.FRAMEWORKS)
def test_finds_the_plugin_not_registered(monkeypatch, framework):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert frameworks.plugin(framework).failed


@pytest.mark.parametrize(
    ("framework", "value", "hidden"),
    [
        (frameworks.VLLM, "other", True),
        (frameworks.VLLM, "", True),
        (frameworks.VLLM, "other,llmir", False),
        (frameworks.SGLANG, "other", True),
        (frameworks.SGLANG, "", False),
        (frameworks.SGLANG, "other, llmir", False),
    ],
)
def test_finds_the_plugin_hidden(monkeypatch, framework, value, hidden):
    monkeypatch.setattr(metadata, "entry_points", lambda group: [SimpleNamespace(name="llmir")])
    monkeypatch.setenv(framework.variable, value)
    finding = frameworks.plugin(framework)
    assert finding.failed == hidden
    if hidden:
        assert framework.variable in finding.found
        assert f"add llmir to {framework.variable}" in finding.remedy


def test_finds_nothing_in_the_place_of_sglangs_operators(environment_with):
    environment_with(sglang="0.5.23")
    assert frameworks.sglang_operators().failed
    environment_with(sglang="0.5.23", llmir_sglang_cpu_shims="1")
    assert not frameworks.sglang_operators().failed


def test_advises_to_tell_sglang_of_the_cpu(monkeypatch):
    monkeypatch.delenv("SGLANG_USE_CPU_ENGINE", raising=False)
    finding = frameworks.sglang_on_cpu()
    assert finding.remedy
    assert not finding.failed
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert not frameworks.sglang_on_cpu().remedy


def test_looks_at_every_framework_that_is_installed(environment_with):
    environment_with(vllm="0.32.0", sglang="0.5.23")
    subjects = [finding.subject for finding in frameworks.findings()]
    assert subjects == ["vLLM", "vLLM plugin", "SGLang", "SGLang plugin", "SGLang operators", "SGLang on a CPU"]


def test_finds_no_bindings(monkeypatch):
    def missing(name):
        raise MissingBindingsError("no MLIR Python bindings: install torch-mlir")

    monkeypatch.setattr(checks.importlib, "import_module", missing)
    finding = checks.bindings()
    assert finding.failed
    assert "install torch-mlir" in finding.remedy


def test_finds_another_architecture(monkeypatch):
    here = Target.detect()
    monkeypatch.setattr(Target, "detect", lambda: replace(here, machine="riscv64", isa="none"))
    monkeypatch.setattr(detection, "find", lambda: None)
    assert checks.instruction_set().failed


def test_finds_a_processor_without_kernels(monkeypatch):
    here = Target.detect()
    monkeypatch.setattr(Target, "detect", lambda: replace(here, isa="none", features=("avx",), machine="x86_64"))
    monkeypatch.setattr(detection, "find", lambda: None)
    finding = checks.instruction_set()
    assert finding.failed and "lacks avx2, f16c, fma" in finding.remedy
    monkeypatch.setattr(detection, "find", lambda: Target.named("cuda:sm_90"))
    assert not checks.instruction_set().failed, "its GPU serves"
    assert [f.found for f in checks.kernels()] == ["not run: this machine has no instruction set for it"]


def test_says_that_amx_is_not_used(monkeypatch):
    here = Target.named("cpu:avx512_bf16")
    monkeypatch.setattr(Target, "detect", lambda: here)
    assert checks.instruction_set().remedy == ""
    with_amx = replace(here, features=(*here.features, "amx_bf16", "amx_tile"))
    monkeypatch.setattr(Target, "detect", lambda: with_amx)
    finding = checks.instruction_set()
    assert "AMX" in finding.remedy and "not measured" in finding.remedy and not finding.failed


def test_runs_a_kernel_of_each_cache_type():
    findings = checks.kernels()
    assert [f.subject for f in findings] == ["kernel, bfloat16", "kernel, float16", "kernel, float32"]
    assert all(f.found.startswith("right: relative error ") and not f.remedy for f in findings)


def test_says_which_kernel_fails_and_why(monkeypatch):
    def run(element_type, openmp):
        if element_type == "f16":
            raise KernelError("was ended by SIGILL")
        return 1e-7

    monkeypatch.setattr(kernel_test, "in_own_process", run)
    assert [(f.failed, f.found) for f in checks.kernels()] == [
        (False, "right: relative error 1.0e-07 against float64"),
        (True, "was ended by SIGILL"),
        (False, "right: relative error 1.0e-07 against float64"),
    ]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "was ended by SIGILL"),
        ("print(0.5)", r"is wrong: relative error 5\.0e-01, at most 4e-03 is rounding"),
        ("print(float('nan'))", "is wrong: relative error nan"),
        ("import sys; sys.exit('no such routine')", "no such routine"),
        ("raise SystemExit(3)", "ended with exit code 3"),
    ],
)
def test_a_kernel_that_does_not_work_is_told_by_how_its_process_ended(program, reason):
    with pytest.raises(KernelError, match=reason):
        kernel_test.in_own_process("bf16", "library", [sys.executable, "-c", program])


def test_shows_the_gpu(monkeypatch):
    h100 = Target.named("cuda:sm_90")
    monkeypatch.setattr(detection, "find", lambda: h100)
    assert "sm_90" in checks.gpu().found


def test_no_gpu_is_no_fault(monkeypatch):
    monkeypatch.setattr(detection, "find", lambda: None)
    assert (checks.gpu().found, checks.gpu().remedy) == ("none", "")


def test_a_gpu_without_kernels_is_no_fault_but_said(monkeypatch):
    def unknown():
        raise TargetError("this GPU is sm_75; serve on the CPU")

    monkeypatch.setattr(detection, "find", unknown)
    assert not checks.gpu().failed
    assert "serve on the CPU" in checks.gpu().remedy


def test_names_the_gpus_that_triton_compiles_for(environment_with):
    environment_with(triton="3.7.1")
    assert all(text in checks.triton().found for text in ("3.7.1", "cuda:sm_90", "hip:gfx942"))


@pytest.mark.parametrize("installed", [{}, {"triton": "2.3.1"}, {"triton": "3.10.0"}])
def test_advises_to_install_a_triton_that_compiles(environment_with, installed):
    environment_with(**installed)
    finding = checks.triton()
    assert not finding.failed
    assert "install one from 3.6 to before 3.10" in finding.remedy


def test_advises_on_a_cache_folder_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMIR_CACHE", str(tmp_path / "file" / "cache"))
    finding = checks.cache()
    assert not finding.failed
    assert "LLMIR_CACHE" in finding.remedy


def test_finds_the_openmp_runtime_of_torch(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "libgomp" in checks.openmp().found


def test_finds_no_openmp_runtime(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(checks.util, "find_spec", lambda name: None)
    assert checks.openmp().failed


def test_advises_to_preload_what_is_installed(monkeypatch):
    monkeypatch.setattr(environment, "recommended_preloads", lambda already: ["/lib/libiomp5.so"])
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    finding = checks.preload()
    assert not finding.failed
    assert "LD_PRELOAD=/lib/libiomp5.so" in finding.remedy
