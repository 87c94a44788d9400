"""``llmir compile`` and ``llmir explain`` on models that vLLM knows, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
from tiny_models import SMOLLM2 as MODEL

from llmir.plan import Plan

ELF = b"\x7fELF"


@pytest.fixture(scope="module")
def llmir(tmp_path_factory):
    """Runs ``llmir ARGUMENTS`` with a cache folder that the tests of this file share."""
    environment = {**os.environ, "LLMIR_CACHE": str(tmp_path_factory.mktemp("cache")), "HF_HUB_OFFLINE": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", "llmir.cli", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

    return run


@pytest.fixture
def variation(tmp_path):
    """Makes a model folder that differs from the real model in its configuration; it has no weights."""

    def make(**changes):
        folder = tmp_path / "model"
        folder.mkdir()
        config = json.loads((MODEL / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def last_line(text):
    return text.strip().splitlines()[-1]


def test_compile_writes_a_plan_that_explain_can_read(llmir, tmp_path):
    path = tmp_path / "plan.json"
    compiled = llmir("compile", MODEL, "--workload", "chat", "-o", path)
    assert compiled.returncode == 0, compiled.stderr
    plan = Plan.read(path)
    assert sum(len(kernel.layers) for kernel in plan.kernels) == 30
    assert plan.workload["name"] == "chat"
    explained = llmir("explain", path)
    assert explained.returncode == 0, explained.stderr
    assert all(decision.decision in " ".join(explained.stdout.split()) for decision in plan.decisions)


def test_compile_prints_nothing_but_the_ir_on_standard_output(llmir):
    done = llmir("compile", MODEL, "--emit", "llm")
    assert done.returncode == 0, done.stderr
    from llmir.ir import dialect, text

    module = text.parse(done.stdout, dialect.context())
    assert text.print_module(module).count("llm.fused_attention") == 30


def test_compile_for_another_machine_emits_its_vectors(llmir):
    done = llmir("compile", MODEL, "--target", "cpu:avx2", "--emit", "llvm")
    assert done.returncode == 0, done.stderr
    assert "vector<8xf32>" in done.stdout
    assert "vector<16xf32>" not in done.stdout


def test_each_kernel_of_a_model_with_two_becomes_an_object(llmir, variation, tmp_path):
    changes = {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "num_hidden_layers": 2,
        "sliding_window": 256,
    }
    done = llmir("compile", variation(**changes), "--emit", "object", "-o", tmp_path / "kernels.o")
    assert done.returncode == 0, done.stderr
    objects = sorted(tmp_path.glob("kernels.*.o"))
    assert len(objects) == 2
    assert all(path.read_bytes().startswith(ELF) for path in objects)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"head_dim": 42}, ["model.layers.0.self_attn.attn", "head size is 42"]),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, ["no attention layer", "nothing for llmir"]),
        ({"model_type": "nothing", "architectures": ["NothingForCausalLM"]}, ["nothing"]),
    ],
    ids=["head size", "no attention", "architecture"],
)
def test_compile_refuses_what_it_cannot_serve(llmir, variation, tmp_path, changes, named):
    path = tmp_path / "plan.json"
    done = llmir("compile", variation(**changes), "-o", path)
    assert done.returncode == 1
    assert last_line(done.stderr).startswith("error: ")
    assert all(name in last_line(done.stderr) for name in named)
    assert "Traceback" not in done.stderr
    assert not path.exists()


def test_compile_says_that_no_hub_has_the_model(llmir):
    done = llmir("compile", "llmir-tests/no-such-model")
    assert done.returncode == 1
    assert last_line(done.stderr).startswith("error: vLLM cannot configure model 'llmir-tests/no-such-model'")
    assert "Traceback" not in done.stderr


def test_check_finds_all_that_serving_needs(llmir):
    done = llmir("check")
    assert done.returncode == 0, done.stdout
    assert "missing" not in done.stdout
