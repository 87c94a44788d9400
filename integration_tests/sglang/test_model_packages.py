"""Model classes from outside SGLang, to the process that makes the plan."""

import os
from pathlib import Path

import pytest
from sglang.srt.models.llama import LlamaForCausalLM
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs
from tiny_models import WriteModel

from llmir.frontends.sglang.planning import plan_of

MODULE = """
from sglang.srt.models.llama import LlamaForCausalLM


class MyLlamaForCausalLM(LlamaForCausalLM):
    pass


EntryClass = MyLlamaForCausalLM


def register():
    from sglang.srt.models.registry import ModelRegistry

    ModelRegistry.models["MyLlamaForCausalLM"] = MyLlamaForCausalLM
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the process will import from; this process has the class already, as SGLang's own would."""
    folder = tmp_path / "package"
    (folder / "my_llama").mkdir(parents=True)
    (folder / "my_llama" / "__init__.py").touch()
    (folder / "my_llama" / "model.py").write_text(MODULE)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setitem(ModelRegistry.models, "MyLlamaForCausalLM", LlamaForCausalLM)
    return folder


def serve(folder: str) -> int:
    """The page size of the plan that is made for the model."""
    asked = {"device": "cpu", "skip_tokenizer_init": True, "attention_backend": "llmir"}
    server_args = ServerArgs(model_path=folder, **asked)
    server_args.resolve_once()
    return plan_of(server_args).block_size


def test_a_plugins_class_is_known(package: Path, write_model: WriteModel, cache: Path) -> None:
    info = package / "my_llama-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_llama\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nmy_llama = my_llama.model:register\n")
    assert serve(write_model("llama", architectures=["MyLlamaForCausalLM"]))


def test_an_external_packages_class_is_known(
    package: Path, write_model: WriteModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_EXTERNAL_MODEL_PACKAGE", "my_llama")
    assert serve(write_model("llama", architectures=["MyLlamaForCausalLM"]))
