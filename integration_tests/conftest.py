"""Fixtures for real frameworks, whichever it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, SMOLLM2, WriteModel

pytest.register_assert_rewrite("self_comparison")


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """``write_model("llama", head_dim=32)``: the folder of a tiny model of a family, with changes."""

    def write(family: str, **changes: Any) -> str:
        folder = tmp_path / family
        folder.mkdir(exist_ok=True)
        config = {"model_type": family, **FAMILIES[family], **changes}
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.fixture
def with_weights(write_model: WriteModel) -> WriteModel:
    """:func:`write_model` with random float32 weights, made by transformers."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def write(family: str, **changes: Any) -> str:
        folder = write_model(family, torch_dtype="float32", **changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 8
            elif weight.dim() > 1:
                weight.data *= 3
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLMIR_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The folder of the real model that `make models` fetches."""
    if not (SMOLLM2 / "config.json").exists():
        pytest.skip("run `make models` first")
    return str(SMOLLM2)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The comparison that the module's ``options()`` ask for, and the file of its report."""
    from llmir.compare import ReportFiles, run

    path = tmp_path_factory.mktemp("results") / "report.json"
    return run([request.module.options()], ReportFiles(json=path)), path
