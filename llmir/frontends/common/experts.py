"""Mixtures of experts as llm ops: which experts a token goes through, and the experts; for both frameworks.

A framework's frontend reads its own layers' attributes and calls these, as with ``layers.py``. Tokens come as
``[tokens, hidden]``; weights are as they lie on this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from llmir.frontends.common.opaque import NotInDialectError
from llmir.frontends.common.quantized import Quantized, quantized
from llmir.frontends.common.recording import Recorder
from llmir.ir import build
from llmir.ir.experts import SCORING

Tensor = torch.Tensor
#: The IR's index types by torch's.
_INDICES = {torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Experts:
    """What a layer of experts keeps, on this rank."""

    gate_up: Tensor | Quantized
    """[local experts, 2 * intermediate or intermediate, hidden]."""
    down: Tensor | Quantized
    """[local experts, hidden, intermediate]."""
    count: int
    """Experts on all ranks."""
    activation: str
    """The framework's name."""
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    shards: int = 1
    """Tensor-parallel ranks among which each expert's intermediate outputs are divided."""
    rank: int = 0
    expert_shards: int = 1
    """Ranks among which the experts are divided equally."""
    expert_rank: int = 0

    @classmethod
    def of(
        cls,
        layer: nn.Module,
        *,
        local: int,
        hidden: int,
        intermediate: int,
        gated: bool,
        method: str | None,
        count: int,
        activation: str,
        shards: int = 1,
        rank: int = 0,
        expert_shards: int = 1,
        expert_rank: int = 0,
    ) -> Experts:
        """Those of a layer that calls its weights as both frameworks do, ``w13_`` and ``w2_`` first.

        ``local``: experts on this rank; ``intermediate``: of each, on this rank. ``method``: how weights are quantized,
        None where they are not. Raises NotInDialectError where weights are stored in no way that is known.
        """
        if count % expert_shards or local * expert_shards != count:
            raise NotInDialectError(f"{count} experts are not divided equally among {expert_shards} ranks")
        shapes = {"w13_": (local, (1 + gated) * intermediate, hidden), "w2_": (local, hidden, intermediate)}
        gate_up, down = (_weight(layer, prefix, shape, method) for prefix, shape in shapes.items())
        return cls(
            gate_up,
            down,
            count,
            activation,
            getattr(layer, "w13_bias", None),
            getattr(layer, "w2_bias", None),
            shards,
            rank,
            expert_shards,
            expert_rank,
        )


def _weight(layer: nn.Module, prefix: str, shape: tuple[int, ...], method: str | None) -> Tensor | Quantized:
    if method is not None:
        return quantized(layer, shape, method, prefix=prefix)
    weight = getattr(layer, f"{prefix}weight")
    if tuple(weight.shape) != shape:
        raise NotInDialectError(f"{prefix}weight is {tuple(weight.shape)} where {shape} would be plain")
    return weight


def route(
    recorder: Recorder,
    router_logits: Tensor,
    *,
    top_k: int,
    scoring: str,
    groups: int = 1,
    top_groups: int = 1,
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    function: Callable[..., object] | None = None,
    index_dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor]:
    """Shares (float32) and choices, [tokens, top_k], of the experts that ``router_logits`` [tokens, experts] choose.

    ``function`` is what chooses in the place of ``scoring``, a model's own. NotInDialectError for a scoring without a
    name in the IR.
    """
    if function is not None:
        scoring = f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"
    elif scoring not in SCORING:
        raise NotInDialectError(f"experts are chosen by {scoring!r}")
    values = build.route(
        recorder.value(router_logits),
        top_k=top_k,
        scoring=scoring,
        groups=groups,
        top_groups=top_groups,
        renormalize=renormalize,
        scale=scale,
        bias=None if bias is None else recorder.weight(bias),
        index_type=_INDICES[index_dtype],
    )
    shape = (*router_logits.shape[:-1], top_k)
    kinds = (torch.float32, index_dtype)
    shares, choices = (
        recorder.set(torch.empty(shape, dtype=kind, device="meta"), value)
        for kind, value in zip(kinds, values, strict=True)
    )
    return shares, choices


def moe(recorder: Recorder, x: Tensor, shares: Tensor, choices: Tensor, experts: Experts) -> Tensor:
    """The chosen experts' results for ``x`` [tokens, hidden], each times its share, summed; of this rank's part alone.

    Summing over ranks, and experts that all tokens go through, are the framework's own layers.
    """
    by_expert = {"shards": experts.expert_shards, "index": experts.expert_rank}
    by_output = {"shards": experts.shards, "index": experts.rank}
    if experts.expert_shards > 1:
        gate_up, down = ({"dim": 0, **by_expert} for _ in range(2))
    else:
        gate_up, down = {"dim": 1, **by_output}, {"dim": 2, **by_output}
    biases = {
        "gate_up_bias": (experts.gate_up_bias, gate_up),
        # The sum over ranks would have a bias of the result as often as there are ranks: it is each rank's own.
        "down_bias": (experts.down_bias, by_expert if experts.expert_shards > 1 else {}),
    }
    value = build.moe(
        recorder.value(x),
        recorder.value(shares),
        recorder.value(choices),
        gate_up=recorder.weight(experts.gate_up, **gate_up),
        down=recorder.weight(experts.down, **down),
        num_experts=experts.count,
        activation=experts.activation,
        **{name: None if bias is None else recorder.weight(bias, **cut) for name, (bias, cut) in biases.items()},
    )
    return recorder.new(value, x)
