"""``llmir compile`` for a GPU on a machine without one, through vLLM's importer: no weights are read."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from llmir.plan import Plan

#: Llama 3 70B as its config.json describes it.
LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
TARGET = "cuda:sm_90"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``llmir compile`` wrote for the 70B model."""
    place = tmp_path_factory.mktemp("llama-70b")
    (place / "model").mkdir()
    (place / "model" / "config.json").write_text(json.dumps(LLAMA_70B))
    command = ["compile", str(place / "model"), "--framework", "vllm", "--target", TARGET, "--emit", "object"]
    done = subprocess.run(
        [sys.executable, "-m", "llmir.cli", *command, "-o", str(place / "compiled")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return place / "compiled"


def test_the_folder_holds_plan_manifest_and_a_binary_for_each_program(folder: Path) -> None:
    (kernel,) = Plan.read(folder / "plan.json").kernels
    binaries = {f"{kernel.symbol}.{program}.cubin" for program in ("append", "decode", "prefill", "merge")}
    assert {path.name for path in folder.iterdir()} == {"plan.json", "manifest.json", *binaries}


def test_the_manifest_is_of_these_binaries(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    entries = [entry for programs in manifest["kernels"].values() for entry in programs.values()]
    assert {entry["file"]: entry["sha256"] for entry in entries} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.cubin")
    }


def test_nothing_spills(folder: Path) -> None:
    (programs,) = json.loads((folder / "manifest.json").read_text())["kernels"].values()
    assert {entry["spills"]["local_bytes_of_a_thread"] for entry in programs.values()} == {0}


def test_the_plan_is_for_the_gpu_and_every_layer(folder: Path) -> None:
    plan = Plan.read(folder / "plan.json")
    assert plan.target["name"] == TARGET
    assert sum(len(kernel.layers) for kernel in plan.kernels) == LLAMA_70B["num_hidden_layers"]
