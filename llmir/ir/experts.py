"""The ops of a mixture of experts: which experts each token goes through, and the experts themselves.

Experts that all tokens go through (shared ones), the gate that gives the scores, and what is done with the results
are layers of their own: linear, activation, elementwise.
"""
# No `from __future__ import annotations`: ext.py reads the annotations of these classes as objects.

from typing import Any

from llmir.ir.base import LLMOp, false_by_default, optional_attribute, require, shape
from llmir.ir.bindings import ext, ir
from llmir.ir.ops import check_same_type, check_weight
from llmir.ir.weight import Weight

#: How a gate's outputs become scores; another function of the framework's goes by its own name, with a dot in it.
SCORING = ("softmax", "sigmoid", "sqrtsoftplus")


class Route(LLMOp, name="route", traits=[ext.Pure]):
    """The ``top_k`` experts of each token: router_logits ``[tokens, experts]``, both results ``[tokens, top_k]``.

    ``shares`` are by how much each expert's result counts: its score, among those chosen summing to 1 where
    ``renormalize`` says so, times ``scale``. Of ``groups`` equal groups of experts only the best ``top_groups`` are
    looked into. ``bias`` ``[experts]`` is added to the scores to choose by, not to the shares. ``choices`` are experts'
    numbers.
    """

    router_logits: ext.Operand[Any]
    top_k: ir.IntegerAttr
    scoring: ir.StringAttr
    groups: ir.IntegerAttr
    top_groups: ir.IntegerAttr
    scale: ir.FloatAttr
    shares: ext.Result[Any]
    choices: ext.Result[Any]
    renormalize: ir.IntegerAttr = false_by_default()
    bias = optional_attribute("bias", Weight)

    def check(self) -> None:
        *tokens, experts = shape(self.router_logits)
        top_k, groups, top_groups = self.top_k.value, self.groups.value, self.top_groups.value
        require(
            top_k > 0 and (experts is None or top_k <= experts),
            f"top_k must be between 1 and the {experts} experts, but is {top_k}",
        )
        require(
            groups > 0 and (experts is None or experts % groups == 0),
            f"{experts} experts cannot be {groups} equal groups",
        )
        require(0 < top_groups <= groups, f"top_groups must be between 1 and the {groups}, but is {top_groups}")
        scoring = self.scoring.value
        require(scoring in SCORING or "." in scoring, f"unknown scoring {scoring!r}; known are {', '.join(SCORING)}")
        for what, result in (("shares", self.shares), ("choices", self.choices)):
            found = shape(result)
            require(found == [*tokens, top_k], f"{what} must have shape {[*tokens, top_k]}, but are {result.type}")
        if self.bias is not None:
            check_weight(self.bias, [experts], "bias")


class MoE(LLMOp, name="moe", traits=[ext.Pure]):
    """Each token through the experts it is routed to: x and result ``[tokens, hidden]``.

    ``shares`` and ``choices`` ``[tokens, top_k]`` are Route's. ``experts`` is how many there are on all ranks; weights
    are of this rank's: ``gate_up`` ``[local experts, 2 * intermediate, hidden]``, or ``[.., intermediate, hidden]``
    where the activation is not gated, ``down`` ``[local experts, hidden, intermediate]``, each with a bias ``[local
    experts, outputs]`` or without. ``activation`` is the framework's name.
    """

    x: ext.Operand[Any]
    shares: ext.Operand[Any]
    choices: ext.Operand[Any]
    gate_up: Weight
    down: Weight
    experts: ir.IntegerAttr
    activation: ir.StringAttr
    result: ext.Result[Any]
    gate_up_bias = optional_attribute("gate_up_bias", Weight)
    down_bias = optional_attribute("down_bias", Weight)

    def check(self) -> None:
        check_same_type(self.x, self.result, "x and result")
        hidden, shares, choices = shape(self.x)[-1], shape(self.shares), shape(self.choices)
        require(shares == choices, f"shares and choices must have one shape, but are {shares} and {choices}")
        check_weight(self.gate_up, [None, None, hidden], "gate_up")
        local, outputs, _ = self.gate_up.shape
        experts, top_k = self.experts.value, self.top_k
        require(
            local is None or 0 < local <= experts,
            f"of {experts} experts a rank cannot have {local}",
        )
        require(
            top_k is None or 0 < top_k <= experts,
            f"a token goes through 1 to {experts} experts, but choices are {self.choices.type}",
        )
        check_weight(self.down, [local, hidden, None], "down")
        inputs = self.down.shape[-1]
        require(
            outputs is None or inputs is None or outputs in (inputs, 2 * inputs),
            f"gate_up must give {inputs} or twice as many, which down takes, but gives {outputs}",
        )
        for what, bias, extent in (
            ("gate_up_bias", self.gate_up_bias, outputs),
            ("down_bias", self.down_bias, hidden),
        ):
            if bias is not None:
                check_weight(bias, [local, extent], what)

    @property
    def top_k(self) -> int | None:
        """How many experts a token goes through; None where that is known only when it runs."""
        return shape(self.choices)[-1]

    @property
    def weights(self) -> list[Weight]:
        """What a token's products are with."""
        return [self.gate_up, self.down]

    def share_read(self, tokens: float) -> float:
        """The part of a rank's experts that a step of ``tokens`` tokens goes through on average, chosen evenly.

        Of E experts a token goes through k, and leaves each out with probability 1 - k / E: 1 - (1 - k / E) ** tokens.
        """
        return 1 - (1 - (self.top_k or self.experts.value) / self.experts.value) ** tokens
