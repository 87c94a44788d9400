"""The llmir command: what it prints, where it writes, and how it ends on bad input."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmir import cli
from llmir.cli import frameworks
from llmir.errors import LlmirError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import CpuVariant, KernelSpec, StepPolicy
from llmir.kernels.gpu import toolchain
from llmir.plan import FORMAT, Decision, Plan, PlannedKernel
from llmir.targets.machine import Target
from llmir.workload import Workload


@pytest.fixture
def plan():
    """A plan for this machine with one kernel and one decision."""
    attention = AttentionSpec.dense(9, 3, 64, "bf16", 128, 0.125, layout="pair")
    here = Target.detect()
    variants = CpuVariant("decode", 1, 3, 64, 4, 4, 64), CpuVariant("prefill", 32, 6, 128, 4, 4, 0)
    spec = KernelSpec(attention, here.isa, variants)
    layers = tuple(f"model.layers.{i}.self_attn.attn" for i in range(30))
    decision = Decision(
        "block_sizing",
        "KV block size",
        "128 tokens",
        "least bytes read",
        {"read_bandwidth": 28.5e9},
        ({"block_size": 64, "seconds": 0.00123456}, {"block_size": 128, "seconds": 0.001}),
    )
    return Plan(
        format=FORMAT,
        framework="vllm",
        framework_version="0.32.0",
        model="models/tiny[1]",
        rank=0,
        world_size=1,
        block_size=128,
        layout="pair",
        element_type="bf16",
        fused=True,
        kernels=(PlannedKernel(spec.symbol, spec, StepPolicy(1, 256, 2), layers, "0" * 64),),
        decisions=(decision,),
        target=here.to_json(),
        target_fingerprint=here.fingerprint,
        workload=Workload.load(None).to_json(),
        module_hash="0" * 64,
        versions={},
    )


@pytest.fixture
def plan_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan.dumps())
    return path


def is_one_sentence(text):
    """One line of prose for the user, without a traceback."""
    return text.startswith("error: ") and text.count("\n") == 1 and "Traceback" not in text


def test_help_loads_neither_mlir_nor_torch_nor_a_framework():
    heavy = {"torch", "torch_mlir", "mlir", "vllm", "matplotlib", "numpy"}
    script = f"import sys, llmir.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    assert all(command in out for command in ("compile", "explain", "compare", "check", "cache"))


def test_an_error_for_the_user_is_one_sentence_and_a_failure(run, monkeypatch):
    def fail(path):
        raise LlmirError("this went\nwrong: do that")

    monkeypatch.setattr(Plan, "read", fail)
    code, out, err = run("explain", "plan.json")
    assert (code, out, err) == (1, "", "error: this went wrong: do that\n")


class TestExplain:
    def test_shows_decision_reason_numbers_and_alternatives(self, run, plan_file):
        code, out, _ = run("explain", plan_file)
        assert code == 0
        for text in ("KV block size: 128 tokens", "least bytes read", "28,500,000,000", "0.00123"):
            assert text in out

    def test_shows_a_list_of_records_as_a_table_in_the_order_of_its_numbers(self, run, plan, plan_file):
        curve = [
            {"from_tokens": 512, "gain_at_16k": 1.25, "gain_at_4k": 1.5, "requests": 2},
            {"from_tokens": "never", "requests": 4},
        ]
        sharing = Decision(
            "prefix-sharing", "30 layers", "read once", "causal", {"break_even": curve, "row_ns": 9.5}, ()
        )
        plan_file.write_text(replace(plan, decisions=(sharing,)).dumps())
        lines = [line.split() for line in run("explain", plan_file)[1].splitlines()]
        at = lines.index(["break", "even"])
        assert lines.index(["row", "ns", "9.5"]) < at
        assert lines[at + 1] == ["from", "tokens", "gain", "at", "4k", "gain", "at", "16k", "requests"]
        assert lines[at + 2 : at + 4] == [["512", "1.5", "1.25", "2"], ["never", "4"]]

    def test_names_kernels_with_their_layers(self, run, plan_file):
        _, out, _ = run("explain", plan_file)
        assert "attention_9x3x64_bf16_block128 for 30 layers" in out
        assert "model.layers.29.self_attn.attn" in out

    def test_shows_brackets_of_a_name_as_they_are(self, run, plan_file):
        assert "models/tiny[1]" in run("explain", plan_file)[1]

    def test_says_that_a_plan_is_for_another_machine(self, run, plan, plan_file):
        plan_file.write_text(replace(plan, target_fingerprint=f"riscv64-{plan.kernels[0].spec.isa}").dumps())
        code, out, _ = run("explain", plan_file)
        assert code == 0
        assert "for riscv64" in out

    @pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format": 1}', "\0"])
    def test_refuses_what_is_no_plan(self, run, tmp_path, content):
        path = tmp_path / "plan.json"
        path.write_text(content)
        code, out, err = run("explain", path)
        assert (code, out) == (1, "")
        assert is_one_sentence(err)

    def test_refuses_a_missing_file(self, run, tmp_path):
        code, _, err = run("explain", tmp_path / "missing.json")
        assert code == 1
        assert is_one_sentence(err)


class TestCompileRefusesBefore:
    """Each of these is known before the framework is imported."""

    @pytest.fixture(autouse=True)
    def no_import(self, monkeypatch):
        from llmir.frontends.vllm import offline

        def fail(model, target):
            raise AssertionError("the model was imported")

        monkeypatch.setattr(offline, "import_model", fail)

    def test_a_processor_without_kernels_before_the_model_is_read(self, run, monkeypatch):
        here = Target.detect()
        monkeypatch.setattr(Target, "detect", lambda: replace(here, isa="none", features=("avx",), machine="x86_64"))
        code, _, err = run("compile", "m")
        assert code == 1 and "lacks avx2, f16c, fma" in err and "name its target" in err

    def test_an_unknown_target(self, run):
        code, _, err = run("compile", "m", "--target", "cpu:abacus")
        assert code == 1
        assert is_one_sentence(err)
        assert "cpu:abacus" in err

    def test_an_unknown_workload(self, run):
        code, _, err = run("compile", "m", "--workload", "nothing")
        assert code == 1
        assert is_one_sentence(err)
        assert "nothing" in err

    def test_an_object_on_a_terminal(self, run):
        code, _, err = run("compile", "m", "--emit", "object")
        assert code == 1
        assert is_one_sentence(err)
        assert "-o" in err

    def test_objects_for_a_gpu_without_a_folder(self, run):
        code, _, err = run("compile", "m", "--target", "cuda:sm_90", "--emit", "object")
        assert code == 1
        assert is_one_sentence(err)
        assert "-o FOLDER" in err

    def test_objects_for_a_gpu_into_a_folder_of_other_things(self, run, tmp_path):
        (tmp_path / "file").write_text("mine")
        code, _, err = run("compile", "m", "--target", "cuda:sm_90", "--emit", "object", "-o", tmp_path)
        assert code == 1
        assert is_one_sentence(err)
        assert "name a new folder" in err

    def test_objects_for_a_gpu_without_triton(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(toolchain, "installed", lambda: None)
        code, _, err = run("compile", "m", "--target", "cuda:sm_90", "--emit", "object", "-o", tmp_path)
        assert code == 1
        assert is_one_sentence(err)
        assert "not installed" in err

    def test_llvm_ir_of_a_gpu(self, run):
        code, _, err = run("compile", "m", "--target", "hip:gfx942", "--emit", "llvm")
        assert code == 1
        assert is_one_sentence(err)
        assert "emit object" in err

    def test_a_place_that_cannot_be_written(self, run, tmp_path):
        (tmp_path / "file").write_text("")
        code, _, err = run("compile", "m", "-o", tmp_path / "file" / "plan.json")
        assert code == 1
        assert is_one_sentence(err)

    def test_missing_bindings(self, run, monkeypatch):
        monkeypatch.delitem(sys.modules, "llmir.ir.bindings", raising=False)
        for package in ("torch_mlir", "torch_mlir.dialects.ext", "mlir", "mlir.dialects.ext"):
            monkeypatch.setitem(sys.modules, package, None)
        code, _, err = run("compile", "m")
        assert code == 1
        assert is_one_sentence(err)
        assert "pip install torch-mlir" in err

    def test_an_unknown_framework(self, run):
        code, _, err = run("compile", "m", "--framework", "abacus")
        assert code == 2
        assert "abacus" in err


@pytest.mark.parametrize(
    ("installed", "asked", "used"),
    [
        ((frameworks.VLLM, frameworks.SGLANG), None, "vllm"),
        ((frameworks.SGLANG,), None, "sglang"),
        ((frameworks.VLLM,), "sglang", "sglang"),
    ],
)
def test_compile_reads_with_the_framework_asked_for_or_installed(run, monkeypatch, installed, asked, used):
    def fail(module):
        if module == "llmir.ir.bindings":
            return None
        raise LlmirError(f"{module} was imported")

    monkeypatch.setattr(frameworks, "installed", lambda: list(installed))
    monkeypatch.setattr(cli.compile.importlib, "import_module", fail)
    _, _, err = run("compile", "m", *(["--framework", asked] if asked else []))
    assert f"llmir.frontends.{used}.offline was imported" in err


@pytest.mark.parametrize(("arguments", "shares"), [([], True), (["on"], True), (["off"], False)])
def test_compile_shares_prefixes_unless_told_otherwise(run, monkeypatch, arguments, shares):
    from llmir import compiler
    from llmir.frontends.vllm import offline

    def compiled(*args, prefix_sharing):
        raise LlmirError(f"compiled with {prefix_sharing}")

    monkeypatch.setattr(frameworks, "installed", lambda: [frameworks.VLLM])
    monkeypatch.setattr(offline, "import_model", lambda model, target: None)
    monkeypatch.setattr(compiler, "compile", compiled)
    _, _, err = run("compile", "m", *(["--prefix-sharing", *arguments] if arguments else []))
    assert f"compiled with {shares}" in err


def test_compile_says_that_there_is_no_framework(run, monkeypatch):
    monkeypatch.setattr(frameworks, "installed", lambda: [])
    code, _, err = run("compile", "m")
    assert code == 1
    assert is_one_sentence(err)
    assert "llmir check" in err


def test_compile_refuses_a_model_that_is_not_there(run, monkeypatch, tmp_path):
    monkeypatch.setattr(frameworks, "installed", lambda: [frameworks.VLLM])
    code, _, err = run("compile", tmp_path / "missing")
    assert code == 1
    assert is_one_sentence(err)
    assert "no such model" in err


def test_compile_refuses_a_folder_without_a_model(run, monkeypatch, tmp_path):
    monkeypatch.setattr(frameworks, "installed", lambda: [frameworks.VLLM])
    code, _, err = run("compile", tmp_path)
    assert code == 1
    assert is_one_sentence(err)
    assert "config.json" in err


def test_a_full_disk_leaves_nothing_half_written(run, monkeypatch, tmp_path):
    def full(path, content):
        Path.write_text(path, "half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "out" / "plan.json"
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(LlmirError, match="No space left"):
        cli.output.deliver("{}", path)
    assert list(path.parent.iterdir()) == []


def test_compare_refuses_an_unknown_workload(run, tmp_path):
    code, _, err = run("compare", "vllm", "--model", "org/model", "--workload", "nothing")
    assert code == 1
    assert is_one_sentence(err)
    assert "nothing" in err


def test_compare_refuses_a_model_that_is_not_there(run, tmp_path):
    report = tmp_path / "report.json"
    code, _, err = run("compare", "vllm", "--model", tmp_path / "missing", "--json", report)
    assert code == 1
    assert is_one_sentence(err)
    assert not report.exists()
