"""A row of the zoo of each kind of decoder that vLLM serves on a CPU: the answers with llmir's kernels are vLLM's own.

Quantized checkpoints and embedding models are in test_quantized.py and test_pooling.py.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import sweep_architectures
import zoo

#: How an architecture is imported, and what of its kind the others have not.
ROWS = {
    "LlamaForCausalLM": ("full", "every layer has an op, and the embedding is not the last layer's"),
    "GPT2LMHeadModel": ("full", "the embedding is the last layer's, and positions are learned"),
    "Gemma2ForCausalLM": ("full", "scores are capped"),
    "Gemma3ForCausalLM": ("full", "most layers have windows, and rotate keys by another base"),
    "Gemma4ForCausalLM": ("open", "heads are of two sizes"),
    "GPTBigCodeForCausalLM": ("open", "there is one KV head"),
    "MixtralForCausalLM": ("full", "tokens are routed to experts"),
    "Qwen2MoeForCausalLM": ("full", "there are shared experts"),
    "CohereForCausalLM": ("open", "a norm is vLLM's own"),
    "OPTForCausalLM": ("open", "the table of positions is vLLM's own"),
    "MiniCPM3ForCausalLM": ("open", "queries and keys are written part by part"),
    "Olmo2ForCausalLM": ("open", "the model is transformers' own"),
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What processes are forked from is started once, and has what the zoo's tool gives it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            **sweep_architectures.ENVIRONMENT,
            "LLMIR_CACHE": str(tmp_path_factory.mktemp("cache")),
        }.items():
            patch.setenv(name, value)
        patch.setattr(zoo, "PATIENCE", 600.0)  # others may be using the machine
        sweep_architectures.preload("vllm")
        yield


@pytest.mark.parametrize("architecture", ROWS)
def test_answers_are_vllms(architecture: str) -> None:
    kinds = sweep_architectures.architectures("vllm")
    row = zoo.row_of("vllm", kinds[architecture], architecture, logs=None)
    assert (row.outcome, row.words, row.level) == (zoo.SAME, "", ROWS[architecture][0])
