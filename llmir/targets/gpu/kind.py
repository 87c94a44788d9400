"""What GPUs have in common: Triton compiles for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import ClassVar

from llmir.ir.attention_spec import QUANTIZED_DTYPE, AttentionSpec, SoftCap
from llmir.ir.cache_format import Layout
from llmir.targets.gpu.chip import Chip
from llmir.targets.kind import Kind
from llmir.targets.records import Hardware, Measurements

#: Rows of the largest tile: larger ones leave no registers for the rest.
MOST_ROWS = 128


class Gpu(Kind):
    """GPUs of one maker: chips by their architecture."""

    on_gpu, where = True, "on a GPU"
    #: Of keys and of values alike; tensors are read by 16 elements, and rows of more than 256 leave no registers.
    head_sizes = range(32, 256 + 1, 16)
    #: What tensor cores multiply and Triton compiles for every architecture here.
    dtypes = ("bf16", "f16")
    score_stages = (SoftCap,)
    kernel_model = "llmir.targets.gpu.kernel_model.GpuKernels"
    chips: ClassVar[Mapping[str, Chip]]
    warp_threads: ClassVar[int]
    """Threads of a warp."""

    @property
    def isas(self) -> tuple[str, ...]:
        return tuple(self.chips)

    @cached_property
    def typical(self) -> Mapping[str, Hardware]:
        return {isa: chip.hardware(isa, self.machine) for isa, chip in self.chips.items()}

    @cached_property
    def published(self) -> Mapping[str, Measurements]:
        return {isa: chip.figures() for isa, chip in self.chips.items()}

    def lanes(self, isa: str) -> int:
        """No page is packed."""
        return 1

    def layouts(self, dtype: str) -> tuple[Layout, ...]:
        return ("row",)

    def runs(self, isa: str, host: Hardware) -> bool:
        """A GPU runs code of its own architecture."""
        return isa == host.isa

    def quantizes(self, isa: str) -> bool:
        return self.chips[isa].quantizes

    def _of_sizes(self, spec: AttentionSpec) -> list[str]:
        found = {
            f"its values are of another size ({spec.value_size}) than keys ({spec.head_size}), which has no kernel "
            f"{self.where}": spec.value_size != spec.head_size,
            f"{spec.queries_per_kv} query heads share a KV head, and a tile of a GPU's kernels has at most "
            f"{MOST_ROWS} rows": spec.queries_per_kv > MOST_ROWS,
        }
        return [*super()._of_sizes(spec), *(reason for reason, applies in found.items() if applies)]

    def _of_cache(self, spec: AttentionSpec, isa: str) -> list[str]:
        """Besides the queries' type, a quantized cache has a kernel on some architectures."""
        if (spec.cache.dtype, spec.cache.scales) != (QUANTIZED_DTYPE, "layer"):
            return super()._of_cache(spec, isa)
        if self.quantizes(isa):
            return []
        others = ", ".join(filter(self.quantizes, self.chips))
        there_are = f"; there are for {others}" if others else ""
        return [f"a KV cache of {spec.cache.dtype} has no kernel on {isa}{there_are}"]
