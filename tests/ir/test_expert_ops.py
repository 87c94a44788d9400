"""The ops of a mixture of experts: what they refuse, and how many experts a step reads."""

import pytest
from small_models import INFO, weight

from llmir.ir import build
from llmir.ir.experts import MoE, Route
from llmir.ir.module import decoder, new_module, ops_of
from llmir.ir.text import InvalidModuleError, verify
from llmir.ir.types import tensor

SHAPES = {"gate_up": (4, 16, 8), "down": (4, 8, 8)}


def module_of(*, routing=None, experts=4, activation="silu", choices=None, biases=None, **shapes):
    """x [tokens, 8] through 2 of 4 experts of 8 * 2 outputs, or with changes."""
    shapes = {**SHAPES, **shapes}
    module = new_module(INFO)
    with decoder(module) as d:
        x = d.input("x", tensor([None, 8], "bf16"))
        scores = d.input("scores", tensor([None, 4], "f32"))
        shares, chosen = build.route(scores, **{"top_k": 2, **(routing or {})})
        if choices is not None:
            chosen = d.input("choices", tensor(choices, "i32"))
        weights = {name: weight(name, *shape) for name, shape in {**shapes, **(biases or {})}.items()}
        d.output(build.moe(x, shares, chosen, num_experts=experts, activation=activation, **weights))
    verify(module)
    return module


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate_up": (2, 16, 8), "down": (2, 8, 8)},  # a rank with half of the experts
        {"gate_up": (4, 8, 8), "activation": "relu2_no_mul"},
        {"biases": {"gate_up_bias": (4, 16), "down_bias": (4, 8)}},
        {"routing": {"scoring": "sigmoid", "groups": 2, "top_groups": 1, "scale": 2.5, "bias": weight}},
        {"routing": {"scoring": "vllm.models.own_scoring", "renormalize": False}},
    ],
)
def test_experts_are_valid(changes):
    routing = dict(changes.get("routing", {}))
    if "bias" in routing:
        routing["bias"] = weight("bias", 4)
    module = module_of(**{**changes, "routing": routing})
    assert len(ops_of(module, Route)) == len(ops_of(module, MoE)) == 1


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"top_k": 5}, "top_k must be between 1 and the 4 experts, but is 5"),
        ({"top_k": 0}, "top_k must be between 1"),
        ({"scoring": "entropy"}, "unknown scoring 'entropy'; known are softmax"),
        ({"groups": 3}, "4 experts cannot be 3 equal groups"),
        ({"groups": 2, "top_groups": 3}, "top_groups must be between 1 and the 2, but is 3"),
    ],
)
def test_routing_refuses(routing, message):
    with pytest.raises(InvalidModuleError, match=message):
        module_of(routing=routing)


def test_a_routing_bias_is_one_an_expert():
    with pytest.raises(InvalidModuleError, match="bias 'bias' has shape"):
        module_of(routing={"bias": weight("bias", 8)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_up": (4, 24, 8)}, "gate_up must give 8 or twice as many"),
        ({"gate_up": (4, 16, 4)}, "gate_up 'gate_up' has shape"),
        ({"down": (4, 16, 8)}, "down 'down' has shape"),
        ({"down": (2, 8, 8)}, "down 'down' has shape"),
        ({"experts": 2}, "of 2 experts a rank cannot have 4"),
        ({"choices": [None, 3]}, "shares and choices must have one shape"),
        ({"biases": {"gate_up_bias": (4, 8)}}, "gate_up_bias 'gate_up_bias' has shape"),
    ],
)
def test_experts_refuse(changes, message):
    with pytest.raises(InvalidModuleError, match=message):
        module_of(**changes)


@pytest.mark.parametrize(("tokens", "read"), [(1, 1 / 2), (2, 3 / 4), (16, 1 - 2**-16), (float("inf"), 1)])
def test_a_step_reads_the_experts_that_its_tokens_go_through(tokens, read):
    module = module_of()
    assert ops_of(module, MoE)[0].share_read(tokens) == read


def test_all_experts_are_read_where_a_token_goes_through_all():
    module = module_of(routing={"top_k": 4})
    assert [ops_of(module, MoE)[0].share_read(tokens) for tokens in (1, 16)] == [1, 1]
