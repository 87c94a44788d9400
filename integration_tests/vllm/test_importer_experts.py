"""vLLM's mixtures of experts in the IR."""

from typing import Any

import pytest
from tiny_models import LAYERS, WriteModel
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from llmir.costs.model import ModelCost
from llmir.frontends.vllm.importer import import_module
from llmir.frontends.vllm.offline import configure
from llmir.ir import ops
from llmir.ir.bindings import ir
from llmir.ir.experts import MoE, Route
from llmir.ir.module import decoder_of, ops_of
from llmir.ir.opaque import import_level, opaque_kinds
from llmir.ir.weight import weights_of

#: One weight [4, 1024, 256] and one [4, 256, 512] a layer, in bfloat16.
EXPERTS_BYTES = LAYERS * 4 * (1024 * 256 + 256 * 512) * 2


def load(folder: str, rank: int = 0, **engine_args: Any) -> ir.Module:
    return import_module(configure(folder, skip_tokenizer_init=True, max_model_len=256, **engine_args), rank)


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
    assert (route.groups.value, route.scale.value, route.bias) == (1, 1.0, None)


def test_groups_scoring_bias_and_experts_for_all_tokens(write_model: WriteModel) -> None:
    module = load(
        write_model(
            "glm4_moe", n_routed_experts=8, n_group=2, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True
        )
    )
    assert opaque_kinds(module) == {}
    route, experts = ops_of(module, Route)[0], ops_of(module, MoE)[0]
    assert (route.scoring.value, route.groups.value, route.top_groups.value) == ("sigmoid", 2, 1)
    assert route.bias.shape == [8]
    block = [op for op in decoder_of(module).entry_block.operations if "layers.1.mlp" in str(op.location)]
    shared = [op.weight.name for op in block if isinstance(op, ops.Linear) and "shared" in op.weight.name]
    assert shared == [f"model.layers.1.mlp.shared_experts.{name}.weight" for name in ("gate_up_proj", "down_proj")]
    # vLLM scales the sum of the chosen experts, not their shares.
    scaled = [op for op in block if isinstance(op, ops.Elementwise) and op.scalar is not None]
    assert route.scale.value * (scaled[0].scalar.value if scaled else 1.0) == 2.5
    assert experts.experts.value == 8


def test_ranks_share_each_expert_and_sum(write_model: WriteModel) -> None:
    module = load(write_model("mixtral"), rank=1, tensor_parallel_size=2)
    experts = ops_of(module, MoE)[0]
    assert [(w.type.dim, w.type.shards, w.type.index) for w in experts.weights] == [(1, 2, 1), (2, 2, 1)]
    assert [weight.shape for weight in experts.weights] == [[4, 512, 256], [4, 256, 256]]
    assert len(ops_of(module, ops.AllReduce)) == 2 * LAYERS + 1


def test_a_step_counts_the_experts_that_it_reads(write_model: WriteModel) -> None:
    module = load(write_model("mixtral"))
    costs = {tokens: ModelCost.of(module, tokens) for tokens in (1, 2, 64)}
    assert {tokens: cost.experts_read_bytes for tokens, cost in costs.items()} == {
        tokens: pytest.approx(EXPERTS_BYTES * (1 - 0.5**tokens)) for tokens in costs
    }
    assert costs[1].weight_bytes - costs[1].experts_read_bytes == costs[64].weight_bytes - costs[64].experts_read_bytes
    assert {cost.token_flops for cost in costs.values()} == {costs[1].token_flops}


def test_mixtral_8x7b_has_its_published_parameters(write_model: WriteModel) -> None:
    """Shapes and size of https://huggingface.co/mistralai/Mixtral-8x7B-v0.1."""
    folder = write_model(
        "mixtral",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    assert sum(weight.elements for weight in weights_of(load(folder)).values()) == 46_702_792_704


def test_a_runner_that_does_more_stays_opaque(write_model: WriteModel, monkeypatch: pytest.MonkeyPatch) -> None:
    initialize = MoERunner.__init__

    def __init__(self: MoERunner, *args: Any, **kwargs: Any) -> None:
        initialize(self, *args, **kwargs)
        self.routed_experts.apply_router_weight_on_input = True

    monkeypatch.setattr(MoERunner, "__init__", __init__)
    module = load(write_model("mixtral"))
    assert {kind.rpartition(".")[2]: count for kind, count in opaque_kinds(module).items()} == {"MoERunner": LAYERS}
    assert ModelCost.of(module, 1).opaque_bytes == EXPERTS_BYTES
