"""Quantized checkpoints in the IR: what is stored, and what a step reads."""

from typing import Any

import pytest
import torch
from tiny_models import LAYERS, WriteModel

from llmir import compiler
from llmir.costs.model import ModelCost
from llmir.frontends.vllm import importer
from llmir.frontends.vllm.offline import configure
from llmir.ir.module import ops_of
from llmir.ir.opaque import Opaque, import_level
from llmir.ir.ops import Linear
from llmir.ir.quant_scheme import QuantScheme
from llmir.ir.remarks import remarks
from llmir.ir.weight import weights_of
from llmir.targets.machine import Target
from llmir.workload import DEFAULT


def compressed(weights: dict[str, Any], activations: dict[str, Any] | None, form: str) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def numbers(bits: int, strategy: str, kind: str = "int", **changes: Any) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **changes}


TOKENS = numbers(8, "token", dynamic=True)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
INT4 = numbers(4, "group", group_size=128)
COMPRESSED = "compressed-tensors"
CASES: dict[str, tuple[dict[str, Any], QuantScheme]] = {
    "gptq": (GPTQ, QuantScheme("gptq", "i4", (1, 128), "bf16", "i4")),
    "awq": (AWQ, QuantScheme("awq", "i4", (1, 128), "bf16", "i4")),
    "fp8": (FP8, QuantScheme("fp8", "f8E4M3FN", (0, 0), "f32")),
    "int8": (
        compressed(numbers(8, "channel"), TOKENS, "int-quantized"),
        QuantScheme(COMPRESSED, "i8", (1, 0), "f32"),
    ),
    "int8 a tensor": (
        compressed(numbers(8, "tensor"), TOKENS, "int-quantized"),
        QuantScheme(COMPRESSED, "i8", (0, 0), "f32"),
    ),
    "int4": (compressed(INT4, None, "pack-quantized"), QuantScheme(COMPRESSED, "i4", (1, 128), "bf16")),
    "int4 with zero points": (
        compressed({**INT4, "symmetric": False}, None, "pack-quantized"),
        QuantScheme(COMPRESSED, "i4", (1, 128), "bf16", "i4"),
    ),
    "int4 a channel": (
        compressed(numbers(4, "channel"), None, "pack-quantized"),
        QuantScheme(COMPRESSED, "i4", (1, 0), "bf16"),
    ),
    "fp8 a channel": (
        compressed(numbers(8, "channel", "float"), numbers(8, "token", "float", dynamic=True), "float-quantized"),
        QuantScheme(COMPRESSED, "f8E4M3FN", (1, 0), "f32"),
    ),
}
#: What layers keep beside numbers, scales and zero points.
OTHER = ("weight_shape", "g_idx", "bias", "input_scale")
#: Three layers that vLLM merges each bring a scale for a tensor, of four bytes; the scheme counts one.
MERGED_SCALES = 2 * 4


def load(monkeypatch: pytest.MonkeyPatch, folder: str, **engine_args: Any) -> tuple[Any, dict[str, float]]:
    """The module, and by layer the bytes of what vLLM keeps for its weights."""
    stored: dict[str, float] = {}
    build = importer._build

    def building(config: Any) -> torch.nn.Module:
        model = build(config)
        for name, parameter in model.named_parameters():
            layer, _, own = name.rpartition(".")
            if layer.endswith("_proj") and own not in OTHER:
                stored[layer] = stored.get(layer, 0) + parameter.numel() * parameter.element_size()
        return model

    monkeypatch.setattr(importer, "_build", building)
    config = configure(folder, skip_tokenizer_init=True, max_model_len=256, **engine_args)
    return importer.import_module(config), stored


@pytest.mark.parametrize(("config", "scheme"), CASES.values(), ids=list(CASES))
def test_linears_say_how_they_are_stored(
    write_model: WriteModel, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], scheme: QuantScheme
) -> None:
    module, stored = load(monkeypatch, write_model("llama", quantization_config=config))
    weights = [op.weight for op in ops_of(module, Linear)]
    assert len(weights) == 4 * LAYERS and import_level(module) == "full"
    assert {weight.scheme for weight in weights} == {scheme}
    assert weights[0].shape == [512, 256]
    for weight in weights:
        missing = stored[weight.name.rpartition(".")[0]] - weight.stored_bytes
        assert 0 <= missing <= (MERGED_SCALES if scheme.block == (0, 0) else 0)


def test_a_step_reads_what_is_stored(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module, stored = load(monkeypatch, write_model("llama", quantization_config=GPTQ))
    cost = ModelCost.of(module)
    assert cost.quantized_bytes == sum(stored.values())
    assert cost.weight_bytes == cost.quantized_bytes + 512 * 256 * 2, "and the head, which is not quantized"
    plain, _ = load(monkeypatch, write_model("llama"))
    assert cost.token_flops == ModelCost.of(plain).token_flops


def test_ranks_share_a_quantized_weight(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model("llama", quantization_config=AWQ)
    module, stored = load(monkeypatch, folder, tensor_parallel_size=2)
    weights = [op.weight for op in ops_of(module, Linear)[:2]]
    assert [(w.shape, w.type.tensor.shape, w.type.dim) for w in weights] == [
        ([256, 256], [512, 256], 0),
        ([256, 128], [256, 256], 1),
    ]
    assert [w.stored_bytes for w in weights] == list(stored.values())[:2]


def test_quantized_weights_count_as_the_models_own(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = [
        sum(weight.elements for weight in weights_of(load(monkeypatch, folder)[0]).values())
        for folder in (write_model("llama"), write_model("llama", quantization_config=GPTQ))
    ]
    assert counts[0] == counts[1]


def test_quantized_experts_say_how_they_are_stored(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmir.ir.experts import MoE

    module, _ = load(monkeypatch, write_model("mixtral", quantization_config=FP8))
    experts = ops_of(module, MoE)[0]
    assert {weight.scheme for weight in experts.weights} == {CASES["fp8"][1]}
    assert sum(weight.stored_bytes for weight in experts.weights) == 4 * (1024 * 256 + 256 * 512 + 2 * 4)


def test_what_is_stored_in_no_known_way_stays_opaque(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmir.frontends.common.quantized.SCALES", ("unheard_of",))
    module, stored = load(monkeypatch, write_model("llama", quantization_config=GPTQ))
    assert len(ops_of(module, Opaque)) == 4 * LAYERS
    assert ModelCost.of(module).opaque_bytes == sum(stored.values())


def test_the_plan_says_what_a_step_reads(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module, stored = load(monkeypatch, write_model("llama", quantization_config=AWQ))
    compiler.optimize(module, Target.named("cpu:avx512_bf16"), DEFAULT)
    [remark] = [remark for remark in remarks(module) if remark.subject == "weights of a decode step"]
    assert remark.numbers["quantized_mb"] == sum(stored.values()) / 2**20
    assert "quantized weights with their scales" in remark.reason
