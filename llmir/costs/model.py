"""What a step of the model costs besides attention: the weights it reads and the products it computes."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from llmir.ir.experts import MoE
from llmir.ir.module import ops_of
from llmir.ir.opaque import Opaque
from llmir.ir.opaque import weight_bytes as opaque_bytes
from llmir.ir.ops import Linear, Logits
from llmir.ir.remarks import Remark
from llmir.targets.records import Measurements


@dataclass(frozen=True)
class ModelCost:
    """The weights of one rank. Norms and the rows of an embedding are left out: thousands of times smaller."""

    weight_bytes: float
    """Bytes a step reads: of experts those that its tokens go through, on average; of opaque layers all they have."""
    token_flops: float
    """Floating-point operations of the weights' products for one token; what opaque layers compute is not known."""
    bf16: bool
    """Whether the products are of bfloat16."""
    tokens: float = inf
    """Of the step."""
    experts_bytes: float = 0.0
    """Of all experts, however many are read."""
    experts_read_bytes: float = 0.0
    quantized_bytes: float = 0.0
    """Of quantized weights that are read, scales and zero points with them."""
    opaque_bytes: float = 0.0

    @classmethod
    def of(cls, module: Any, tokens: float = inf) -> ModelCost:
        """The cost of a module's linear layers, experts, logits and opaque layers in a step of ``tokens`` tokens."""
        opaque = float(sum(map(opaque_bytes, ops_of(module, Opaque))))
        weight_bytes, token_flops = opaque, 0.0
        experts_bytes = experts_read_bytes = quantized_bytes = 0.0
        types = set()
        for op in ops_of(module, Linear, Logits, MoE):
            experts = isinstance(op, MoE)
            read, used = (op.share_read(tokens), op.share_read(1)) if experts else (1.0, 1.0)
            for weight in op.weights if experts else [op.weight]:
                stored = weight.stored_bytes
                weight_bytes += stored * read
                token_flops += 2 * weight.elements * used
                types.add(weight.element_type)
                if experts:
                    experts_bytes += stored
                    experts_read_bytes += stored * read
                if weight.scheme is not None:
                    quantized_bytes += stored * read
        bf16 = bool(types) and types <= {"bf16"}
        return cls(weight_bytes, token_flops, bf16, tokens, experts_bytes, experts_read_bytes, quantized_bytes, opaque)

    def weight_seconds(self, figures: Measurements) -> float:
        """Seconds to read the weights once, all threads together."""
        return self.weight_bytes / figures.read_bandwidth_all

    def token_seconds(self, figures: Measurements) -> float:
        """Seconds to compute one token of a prefill, all threads together."""
        rate = figures.bf16_rate if self.bf16 else figures.f32_rate
        return self.token_flops / (rate * figures.threads)

    def remark(self, pass_name: str) -> Remark | None:
        """What a step reads, where that is not all weights as they are: of experts, of quantized or opaque layers."""
        parts = {
            f"{_gb(self.experts_read_bytes)} of the {_gb(self.experts_bytes)} of experts, which {self.tokens:g} tokens "
            f"that choose evenly go through": self.experts_bytes,
            f"{_gb(self.quantized_bytes)} of quantized weights with their scales": self.quantized_bytes,
            f"{_gb(self.opaque_bytes)} of opaque layers, all that they have": self.opaque_bytes,
        }
        reasons = [words for words, found in parts.items() if found]
        if not reasons:
            return None
        sizes = {
            "read_mb": self.weight_bytes,
            "experts_mb": self.experts_bytes,
            "experts_read_mb": self.experts_read_bytes,
            "quantized_mb": self.quantized_bytes,
            "opaque_mb": self.opaque_bytes,
        }
        numbers = {"tokens": self.tokens, **{name: size / 2**20 for name, size in sizes.items() if size}}
        reason = "among them " + ", ".join(reasons)
        return Remark(pass_name, "weights of a decode step", f"{_gb(self.weight_bytes)} are read", reason, numbers)


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
