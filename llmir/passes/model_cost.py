"""What a step of the model costs besides attention: the weights it reads and the products it computes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmir.ir.module import ops_of
from llmir.ir.opaque import Opaque
from llmir.ir.opaque import weight_bytes as opaque_bytes
from llmir.ir.ops import Linear, Logits, MoE
from llmir.target import Measurements


@dataclass(frozen=True)
class ModelCost:
    """The weights of one rank. Norms and the rows of an embedding are left out: thousands of times smaller."""

    weight_bytes: float
    """Bytes a step reads, however many tokens it has; of opaque layers all that they have."""
    token_flops: float
    """Floating-point operations of the weights' products for one token; what opaque layers compute is not known."""
    bf16: bool
    """Whether the products are of bfloat16."""

    @classmethod
    def of(cls, module: Any) -> ModelCost:
        """The cost of a module's linear layers, experts, logits and opaque layers."""
        weight_bytes = float(sum(map(opaque_bytes, ops_of(module, Opaque))))
        token_flops = 0.0
        types = set()
        for op in ops_of(module, Linear, Logits, MoE):
            weights = [op.gate_up, op.down] if isinstance(op, MoE) else [op.weight]
            used = _share_of_experts(op) if isinstance(op, MoE) else 1.0
            for weight in weights:
                weight_bytes += weight.stored_bytes
                token_flops += 2 * weight.elements * used
                types.add(weight.element_type)
        return cls(weight_bytes, token_flops, bool(types) and types <= {"bf16"})

    def weight_seconds(self, figures: Measurements) -> float:
        """Seconds to read the weights once, all threads together."""
        return self.weight_bytes / figures.read_bandwidth_all

    def token_seconds(self, figures: Measurements) -> float:
        """Seconds to compute one token of a prefill, all threads together."""
        rate = figures.bf16_rate if self.bf16 else figures.f32_rate
        return self.token_flops / (rate * figures.threads)


def _share_of_experts(op: MoE) -> float:
    """The part of a rank's experts that one token goes through, on average."""
    experts = op.router_logits.type.shape[-1]
    return op.top_k.value / experts
