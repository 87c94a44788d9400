"""vLLM's own code for CUDA with llmir's flag, in a process that takes this machine for one with an H100."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cuda_cases
import pytest
import tiny_models

from llmir.frontends.vllm import plugin

PROGRAM = Path(__file__).parent / "cuda_process.py"
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2")


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process found."""
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        (folder / family).mkdir()
        config = {"model_type": family, **tiny_models.FAMILIES[family]}
        (folder / family / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder)],
        env={**os.environ, "LLMIR_CACHE": str(tmp_path_factory.mktemp("cache"))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = next(line for line in done.stdout.splitlines() if line.startswith("FACTS"))
    return json.loads(found.removeprefix("FACTS"))


def test_without_the_flag_nothing_changes(facts: dict[str, Any]) -> None:
    before, with_plugin = facts["untouched"]
    assert with_plugin == before
    assert facts["own"] == ["vllm.v1.attention.backends.triton_attn.TritonAttentionBackend"] * 2


def test_vllm_chooses_the_backend_for_gpus_by_both_names(facts: dict[str, Any]) -> None:
    assert facts["chosen"] == [plugin.BACKEND_PATHS["cuda"]] * 2


def test_the_flag_leaves_graphs_scheduling_and_runner_alone(facts: dict[str, Any]) -> None:
    assert facts["runner"] == facts["untouched"][0][1:4]


def test_the_plan_is_for_the_gpu(facts: dict[str, Any]) -> None:
    assert facts["target"][:2] == ["cuda:sm_90", "sm_90"]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_read_beside_a_gpu(facts: dict[str, Any], family: str) -> None:
    assert facts["imported"][family] == tiny_models.LAYERS


@pytest.mark.parametrize(("served", "groups"), [("llama", 1), ("fp8", 1), ("gemma2", 2)])
def test_vllm_builds_layers_and_caches_for_it(facts: dict[str, Any], served: str, groups: int) -> None:
    built = facts[served]
    assert built["implementations"] == ["LlmirGpuAttentionImpl"]
    assert (built["layout"], built["groups"], built["caches"]) == ("LBHNC", groups, tiny_models.LAYERS)


@pytest.mark.parametrize("served", ["llama", "fp8", "gemma2"])
def test_every_block_size_is_the_plans(facts: dict[str, Any], served: str) -> None:
    assert len(set(facts[served]["block size"])) == 1


@pytest.mark.parametrize("number", range(len(cuda_cases.ENGINES)))
def test_engines_are_served_or_refused_by_name(facts: dict[str, Any], number: int) -> None:
    check(facts["engines"][number], cuda_cases.ENGINES[number][1])


@pytest.mark.parametrize("number", range(len(cuda_cases.LAYERS)))
def test_layers_are_served_or_refused_by_name(facts: dict[str, Any], number: int) -> None:
    check(facts["layers"][number], cuda_cases.LAYERS[number][1])


@pytest.fixture(scope="module")
def said_on_rocm() -> list[str]:
    """The same layers on ROCm, which has no llmir kernels for fp8 caches."""
    command = [sys.executable, str(PROGRAM.with_name("rocm_process.py"))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("FACTS"))[len("FACTS") :])


@pytest.mark.parametrize("number", range(len(cuda_cases.LAYERS)))
def test_rocm_serves_the_same_layers_but_fp8(said_on_rocm: list[str], number: int) -> None:
    changes, reason = cuda_cases.LAYERS[number]
    if str(changes.get("kv_cache_dtype", "auto")).startswith("fp8"):
        reason = "needs an NVIDIA GPU"
    assert (reason or plugin.BACKEND_PATHS["cuda"]) in said_on_rocm[number]


def check(said: str, expected: str) -> None:
    """Nothing was said where nothing was expected, else something that has it."""
    assert (expected in said) if expected else not said, said
