"""A kind of machine, as everything outside of its folder sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from llmir.ir.attention_spec import AttentionSpec, ScoreStage
from llmir.ir.cache_format import Layout

if TYPE_CHECKING:
    from llmir.targets.records import Hardware, Measurements


class Kind(ABC):
    """What llmir knows of a kind of machine: its instruction sets, which attention it has kernels for, its figures."""

    prefix: ClassVar[str]
    """Of its targets' names: ``cpu`` of ``cpu:avx2``."""
    machine: ClassVar[str]
    """Hardware.machine of all of them."""
    on_gpu: ClassVar[bool]
    """Whether kernels are programs that Triton compiles (``kernels/gpu``); else they are native code, made by MLIR
    (``kernels/cpu``)."""
    where: ClassVar[str]
    """For a reason why there is no kernel: "on a CPU"."""
    head_sizes: ClassVar[range]
    dtypes: ClassVar[tuple[str, ...]]
    """What kernels compute queries in."""
    score_stages: ClassVar[tuple[type[ScoreStage], ...]]
    """What kernels compute, each once at most, in this order."""
    bidirectional: ClassVar[bool] = False
    """Whether kernels compute attention that is not causal."""
    kernel_model: ClassVar[str]
    """Module and class of its KernelModel: a name, because what a compiled object depends on ends before what chooses
    its tiles."""

    @property
    @abstractmethod
    def isas(self) -> tuple[str, ...]:
        """Instruction sets of its CPUs, or architectures of its GPUs, the best first."""

    @property
    @abstractmethod
    def typical(self) -> Mapping[str, Hardware]:
        """A typical machine of each."""

    @property
    @abstractmethod
    def published(self) -> Mapping[str, Measurements]:
        """Published figures of these machines."""

    @abstractmethod
    def lanes(self, isa: str) -> int:
        """Keys that a vector holds of a packed cache."""

    @abstractmethod
    def layouts(self, dtype: str) -> tuple[Layout, ...]:
        """How pages of a cache of ``dtype`` may lie."""

    @abstractmethod
    def runs(self, isa: str, host: Hardware) -> bool:
        """Whether ``host`` runs kernels made for ``isa``, which is one of this kind."""

    def unused(self, host: Hardware) -> str:
        """What ``host`` has that would make serving faster and no kernel uses; empty where there is nothing."""
        return ""

    def quantizes(self, isa: str) -> bool:
        """Whether kernels for ``isa`` read a cache of QUANTIZED_DTYPE."""
        return False

    def unsupported(self, spec: AttentionSpec, isa: str) -> list[str]:
        """Why no kernel for ``isa`` computes ``spec``: every reason, a clause each.

        None: there is one, in some layout of the cache.
        """
        return [*self._of_stages(spec), *self._of_sizes(spec), *self._of_cache(spec, isa)]

    def _of_stages(self, spec: AttentionSpec) -> list[str]:
        known = self.score_stages
        reasons = [
            f"{stage.title} has no kernel {self.where}" for stage in spec.score_stages if not isinstance(stage, known)
        ]
        order = [known.index(type(stage)) for stage in spec.score_stages if isinstance(stage, known)]
        if order != sorted(set(order)):
            words = ", then ".join(stage.title for stage in spec.score_stages)
            reasons.append(f"scores that go through {words} have no kernel {self.where}")
        return reasons

    def _of_sizes(self, spec: AttentionSpec) -> list[str]:
        sizes, dtypes = self.head_sizes, " and ".join(self.dtypes)
        found = {
            f"bidirectional attention has no kernel {self.where}": not (spec.mask.causal or self.bidirectional),
            "ALiBi of bidirectional attention has no kernel": not spec.mask.causal and spec.alibi,
            f"its head size is {spec.head_size}, and there are kernels for {self._known_sizes} {self.where}": (
                spec.head_size not in sizes
            ),
            f"queries of {spec.dtype} have no kernel {self.where}; there are kernels for {dtypes}": (
                spec.dtype not in self.dtypes
            ),
        }
        return [reason for reason, applies in found.items() if applies]

    @property
    def _known_sizes(self) -> str:
        return f"multiples of {self.head_sizes.step} from {self.head_sizes[0]} to {self.head_sizes[-1]}"

    def _of_cache(self, spec: AttentionSpec, isa: str) -> list[str]:
        """A cache of the queries' type has a kernel."""
        cache = spec.cache
        if (cache.dtype, cache.scales) == (spec.dtype, "none"):
            return []
        with_scales = " with scales" if cache.dtype == spec.dtype else ""
        return [f"a KV cache of {cache.dtype}{with_scales} has no kernel {self.where}"]
