"""A model class that one of vLLM's general plugins registers, to the process that makes the plan."""

import os
from pathlib import Path

import pytest
from tiny_models import WriteModel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import ModelRegistry

from llmir.frontends.vllm import plugin
from llmir.frontends.vllm.planning import PLAN_KEY

MODULE = """
from vllm.model_executor.models.llama import LlamaForCausalLM


class MyLlamaForCausalLM(LlamaForCausalLM):
    pass


def register():
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model("MyLlamaForCausalLM", "my_llama:MyLlamaForCausalLM")
"""


@pytest.fixture
def my_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package whose plugin registers a class, which this process, as vLLM's own would, has loaded."""
    package = tmp_path / "package"
    info = package / "my_llama-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "my_llama.py").write_text(MODULE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_llama\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nmy_llama = my_llama:register\n")
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.syspath_prepend(package)
    ModelRegistry.register_model("MyLlamaForCausalLM", "my_llama:MyLlamaForCausalLM")


def test_the_planning_process_loads_it_too(my_llama: None, write_model: WriteModel, cache: Path) -> None:
    plugin.register()
    folder = write_model("llama", architectures=["MyLlamaForCausalLM"])
    arguments = EngineArgs(model=folder, skip_tokenizer_init=True, max_model_len=256, attention_backend="LLMIR")
    assert arguments.create_engine_config().additional_config[PLAN_KEY]["block_size"]
