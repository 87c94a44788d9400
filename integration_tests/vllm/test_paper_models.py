"""The eight models of the project's paper at full size, from their published configurations, without weights."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmir.frontends.common.support import UnsupportedFeatureError
from llmir.ir.attention import PagedAttention, spec_of
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.module import ops_of
from llmir.ir.opaque import import_level
from llmir.ir.weight import weights_of

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from paper_models import CONFIGS, CPU, GPU, MODELS, PATIENCE, found, import_published, token_bytes
from sweep_architectures import answer_of_child

LATENT = "deepseek-v2-lite"
SERVED = sorted(set(MODELS) - {LATENT})
#: What a process that imports a 72B configuration may take.
MOST_BYTES = 4e9


@pytest.mark.parametrize("name", SERVED)
def test_parameters_and_kv_bytes_are_the_published_ones(name: str, tmp_path: Path) -> None:
    module = import_published(name, folder=tmp_path)
    assert import_level(module) == "full"
    assert sum(weight.elements for weight in weights_of(module).values()) == MODELS[name].parameters
    assert token_bytes(module) == MODELS[name].token_bytes


@pytest.mark.parametrize(("name", "ranks"), [(name, max(MODELS[name].gpus)) for name in SERVED])
def test_ranks_share_the_published_model(name: str, ranks: int, tmp_path: Path) -> None:
    module = import_published(name, ranks, GPU, tmp_path, rank=ranks - 1)
    weights = weights_of(module).values()
    assert sum(weight.whole_elements for weight in weights) == MODELS[name].parameters
    # Norms stand on every rank; all else is cut.
    everywhere = sum(weight.elements for weight in weights if weight.name.endswith("norm.weight"))
    cut = sum(weight.elements for weight in weights) - everywhere
    assert cut * ranks + everywhere == MODELS[name].parameters
    assert token_bytes(module) * ranks == MODELS[name].token_bytes


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("llama-2-70b", AttentionSpec.dense(64, 8, 128, "f16", 128, scale=128**-0.5)),
        ("phi-3-mini-4k", AttentionSpec.dense(32, 32, 96, "bf16", 128, scale=96**-0.5, window=2047)),
        ("qwen2-7b", AttentionSpec.dense(28, 4, 128, "bf16", 128, scale=128**-0.5)),
    ],
)
def test_attention_is_the_published_one(name: str, spec: AttentionSpec, tmp_path: Path) -> None:
    module = import_published(name, folder=tmp_path)
    layers = json.loads((CONFIGS / f"{name}.json").read_text())["num_hidden_layers"]
    assert [spec_of(op) for op in ops_of(module, PagedAttention)] == [spec] * layers


def test_latent_attention_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeatureError, match="the model uses multi-head latent attention"):
        import_published(LATENT, folder=tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_configurations_are_the_published_models(name: str) -> None:
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == MODELS[name].parameters


def test_a_model_of_72b_is_imported_in_little_memory() -> None:
    made = answer_of_child(found, "qwen2-72b", 1, CPU, patience=PATIENCE)
    assert made.parameters == MODELS["qwen2-72b"].parameters
    assert made.peak_bytes < MOST_BYTES
