"""SGLang's mixtures of experts and quantized checkpoints in the IR."""

from typing import Any

import pytest
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from tiny_models import LAYERS, WriteModel

from llmir.costs.model import ModelCost
from llmir.frontends.sglang.importer import configure, import_module
from llmir.ir.bindings import ir
from llmir.ir.experts import MoE, Route
from llmir.ir.module import ops_of
from llmir.ir.opaque import import_level, opaque_kinds
from llmir.ir.ops import AllReduce, Linear
from llmir.ir.quant_scheme import QuantScheme

#: One weight [4, 1024, 256] and one [4, 256, 512] a layer, in bfloat16.
EXPERTS_BYTES = LAYERS * 4 * (1024 * 256 + 256 * 512) * 2
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}


def load(folder: str, rank: int = 0, **fields: Any) -> ir.Module:
    return import_module(configure(model_path=folder, skip_tokenizer_init=True, **fields), rank)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_known_whole(write_model: WriteModel, family: str) -> None:
    module = load(write_model(family))
    assert import_level(module) == "full"
    assert len(ops_of(module, Route)) == len(ops_of(module, MoE)) == LAYERS


def test_tokens_are_routed_by_the_gate(write_model: WriteModel) -> None:
    module = load(write_model("mixtral"))
    route, experts = ops_of(module, Route)[0], ops_of(module, MoE)[0]
    gate = route.router_logits.owner.opview
    assert gate.weight.name == "model.layers.0.block_sparse_moe.gate.weight"
    assert experts.x == gate.x
    assert (experts.shares, experts.choices) == (route.shares, route.choices)
    assert (experts.experts.value, experts.top_k) == (4, 2)
    assert [weight.shape for weight in experts.weights] == [[4, 1024, 256], [4, 256, 512]]


@pytest.mark.parametrize("renormalize", [True, False])
def test_how_experts_are_chosen_is_the_configurations(write_model: WriteModel, renormalize: bool) -> None:
    module = load(write_model("qwen3_moe", norm_topk_prob=renormalize))
    route = ops_of(module, Route)[0]
    assert (route.scoring.value, route.top_k.value, route.renormalize.value) == ("softmax", 2, renormalize)


def test_ranks_share_each_expert_and_sum(write_model: WriteModel) -> None:
    module = load(write_model("mixtral"), rank=1, tp_size=2)
    experts = ops_of(module, MoE)[0]
    assert [(w.type.dim, w.type.shards, w.type.index) for w in experts.weights] == [(1, 2, 1), (2, 2, 1)]
    assert len(ops_of(module, AllReduce)) == 2 * LAYERS + 1


def test_a_step_counts_the_experts_that_it_reads(write_model: WriteModel) -> None:
    module = load(write_model("mixtral"))
    read = [ModelCost.of(module, tokens).experts_read_bytes for tokens in (1, 2)]
    assert read == [EXPERTS_BYTES / 2, EXPERTS_BYTES * 3 / 4]


def test_experts_that_do_more_stay_opaque(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize = FusedMoE.__init__

    def __init__(self: FusedMoE, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.moe_runner_config.apply_router_weight_on_input = True

    monkeypatch.setattr(FusedMoE, "__init__", __init__)
    module = load(write_model("mixtral"))
    assert not ops_of(module, MoE) and opaque_kinds(module)
    assert ModelCost.of(module, 1).opaque_bytes >= EXPERTS_BYTES


def test_linears_say_how_they_are_stored(write_model: WriteModel) -> None:
    module = load(write_model("llama", quantization_config=GPTQ))
    weights = [op.weight for op in ops_of(module, Linear)]
    assert len(weights) == 4 * LAYERS and import_level(module) == "full"
    assert {weight.scheme for weight in weights} == {QuantScheme("gptq", "i4", (1, 128), "bf16", "i4")}
    # Numbers of half a byte; for 128 of them two bytes of scale and half a byte of zero point.
    assert weights[0].stored_bytes == 512 * 256 / 2 + 512 * 2 * (2 + 0.5)
