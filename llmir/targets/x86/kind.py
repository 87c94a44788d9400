"""x86-64 CPUs from AVX2 on."""

from __future__ import annotations

from llmir.ir.attention_spec import Alibi, AttentionSpec, SoftCap
from llmir.ir.cache_format import Layout, packed_layout
from llmir.ir.dtypes import QUERY_DTYPES
from llmir.targets.kind import Kind
from llmir.targets.records import Hardware
from llmir.targets.x86.isa import INSTRUCTION_SETS
from llmir.targets.x86.published import ARCHITECTURE, PUBLISHED, TYPICAL

#: Intel's matrix unit, which no kernel uses.
_AMX = frozenset({"amx_tile", "amx_bf16"})


class X86(Kind):
    """Kernels in vector registers of any of INSTRUCTION_SETS."""

    prefix, machine, on_gpu, where = "cpu", ARCHITECTURE, False, "on a CPU"
    #: Of keys and of values each by themselves: narrow vectors hold 8, and the last is a latent key with its rotary
    #: part.
    head_sizes = range(32, 576 + 1, 8)
    dtypes = QUERY_DTYPES
    score_stages = (SoftCap, Alibi)
    bidirectional = True
    kernel_model = "llmir.targets.x86.kernel_model.X86Kernels"
    typical, published = TYPICAL, PUBLISHED

    @property
    def isas(self) -> tuple[str, ...]:
        return tuple(INSTRUCTION_SETS)

    def lanes(self, isa: str) -> int:
        return INSTRUCTION_SETS[isa].lanes

    def layouts(self, dtype: str) -> tuple[Layout, ...]:
        return packed_layout(dtype), "row"

    def runs(self, isa: str, host: Hardware) -> bool:
        """A machine runs code for any instruction set whose features it has."""
        return host.machine == self.machine and INSTRUCTION_SETS[isa].features <= set(host.features)

    def unused(self, host: Hardware) -> str:
        if not set(host.features) >= _AMX:
            return ""
        return (
            "this machine has AMX, which no kernel of llmir uses yet: the framework's own AMX kernels may prefill "
            "faster here (not measured)"
        )

    def _of_sizes(self, spec: AttentionSpec) -> list[str]:
        reasons, size = super()._of_sizes(spec), spec.value_size
        if size != spec.head_size and size not in self.head_sizes:
            reasons.append(f"its values are of size {size}, and there are kernels for {self._known_sizes} {self.where}")
        return reasons
