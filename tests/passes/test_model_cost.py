"""What a step reads of a model's weights, and what is said about it."""

import pytest

from llmir.costs.model import ModelCost
from llmir.ir import build
from llmir.ir.bindings import ir
from llmir.ir.dialect import context
from llmir.ir.module import ModelInfo, decoder, new_module
from llmir.ir.quant_scheme import QuantScheme
from llmir.ir.types import QuantizedTensor, tensor
from llmir.ir.weight import Weight

AWQ = QuantScheme("awq", "i4", (1, 128), "f16", "i4")


@pytest.fixture(autouse=True)
def _context():
    with context(), ir.Location.unknown():
        yield


def module_of(*, experts=False, quantized=False):
    """A linear layer of 256 x 256, and if asked for 2 of 8 experts."""
    module = new_module(ModelInfo("vllm 0.32.0", "tiny"))
    with decoder(module) as d:
        x = d.input("x", tensor([None, 256], "bf16"))
        kind = QuantizedTensor.build(AWQ, [256, 256]) if quantized else tensor([256, 256], "bf16")
        x = build.linear(x, Weight.build("linear", kind))
        if experts:
            shares, choices = build.route(d.input("scores", tensor([None, 8], "f32")), top_k=2)
            gate_up, down = (Weight.build(name, tensor([8, 256, 256], "bf16")) for name in ("gate_up", "down"))
            gate_up = Weight.build("gate_up", tensor([8, 512, 256], "bf16"))
            x = build.moe(x, shares, choices, gate_up=gate_up, down=down, num_experts=8)
        d.output(x)
    return module


def test_a_dense_model_reads_all_its_weights_and_nothing_is_said():
    module = module_of()
    for tokens in (1, 16):
        cost = ModelCost.of(module, tokens)
        assert (cost.weight_bytes, cost.token_flops) == (2 * 256**2, 2 * 256**2)
        assert cost.remark("block-sizing") is None


def test_of_experts_a_step_reads_those_that_its_tokens_go_through():
    module, whole = module_of(experts=True), 8 * 3 * 256**2 * 2
    for tokens, part in ((1, 1 / 4), (2, 7 / 16), (16, 1 - 0.75**16)):
        cost = ModelCost.of(module, tokens)
        assert cost.experts_read_bytes == pytest.approx(whole * part)
        assert cost.weight_bytes == cost.experts_read_bytes + 2 * 256**2
    assert ModelCost.of(module).experts_read_bytes == whole


def test_a_token_is_multiplied_with_its_own_experts():
    assert ModelCost.of(module_of(experts=True), 16).token_flops == 2 * 256**2 + 2 * 3 * 256**2 * 2


def test_it_is_said_what_of_the_experts_is_read():
    remark = ModelCost.of(module_of(experts=True), 2).remark("block-sizing")
    assert remark.decision == "0.00151 GB are read"
    assert "0.00138 GB of the 0.00315 GB of experts, which 2 tokens that choose evenly go through" in remark.reason
    assert remark.numbers["experts_read_mb"] == pytest.approx(8 * 3 * 256**2 * 2 * 7 / 16 / 2**20)


def test_quantized_weights_are_read_with_their_scales():
    cost = ModelCost.of(module_of(quantized=True), 1)
    assert cost.weight_bytes == cost.quantized_bytes == 256 * (256 / 2 + 2 * 2.5)
    assert not cost.bf16
    assert "of quantized weights with their scales" in cost.remark("block-sizing").reason
