"""What every attention backend does with a plan: a kernel for each layer, one work list a step, addresses of tensors.

Knows no framework and needs no torch: tensors are whatever has torch's ``stride``, ``shape`` and ``data_ptr``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from llmir.errors import UnsupportedLayerError
from llmir.ir.signature import AttentionSignature, KernelSpec
from llmir.plan import Plan, PlannedKernel
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step

#: A framework may have computed a layer's scale in another order than when the plan was made.
SCALE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class LayerFacts:
    """An attention layer as the serving framework has it, on this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    element_type: str
    """Of queries, and of the layer's KV cache where it is not quantized, by its name in the IR: bf16, f16, f32."""
    block_size: int
    """Tokens in a block of the framework's cache."""
    scale: float
    """Factor on query-key products."""
    window: int = 0
    """Tokens a query may attend to, itself included; 0: all."""
    soft_cap: float = 0.0
    """See AttentionSignature; 0: none."""
    quantized: bool = False
    """See AttentionSignature."""
    sinks: bool = False
    """See AttentionSignature."""


@dataclass
class SharingCount:
    """What reading shared prefixes once has saved since serving began."""

    steps: int = 0
    """Steps in which anything was shared."""
    requests: int = 0
    """Requests of which a part was read together with that of others, summed over steps."""
    kv_bytes: int = 0
    """Bytes of keys and values, of all layers, that were not read again."""
    steps_without_room: int = 0
    """Steps that a kernel had no room to share in, see Schedule."""


class Runner(Protocol):
    """What runs a kernel: AttentionRunner on a CPU, GpuAttentionRunner on a GPU."""

    spec: KernelSpec

    def begin_step(self, step: Step, threads: int) -> Schedule:
        """Prepares the calls of one step and gives its work list."""


RunnerT = TypeVar("RunnerT", bound=Runner)


class PlannedLayers(Generic[RunnerT]):
    """Attention layers that share each step's work lists, with the plan's kernels loaded for them.

    Layers share a step when they share query starts, lengths and block table: one object for each of the framework's
    groups of KV caches.
    """

    def __init__(self, plan: Plan, load: Callable[[PlannedKernel], RunnerT]):
        """``load`` gives what runs one of the plan's kernels."""
        self._plan = plan
        self._load = load
        self._runners: dict[str, RunnerT] = {}
        self._layers: Counter[str] = Counter()
        self.sharing = SharingCount()

    @property
    def kernels(self) -> dict[str, int]:
        """Layers bound so far, by the symbol of their kernel."""
        return dict(self._layers)

    def bind(self, layer: str, facts: LayerFacts) -> RunnerT:
        """What computes the layer that the framework calls ``layer``; layers of one kernel get the same.

        Raises PlanError where the plan has no such layer, UnsupportedLayerError where its layer is unlike ``facts``,
        KernelError where the kernel cannot be loaded.
        """
        kernel = self._plan.kernel_for(layer)
        _check(layer, kernel.spec.signature, facts)
        if kernel.symbol not in self._runners:
            self._runners[kernel.symbol] = self._load(kernel)
        self._layers[kernel.symbol] += 1
        return self._runners[kernel.symbol]

    def begin_step(self, step: Step, threads: int) -> None:
        """Prepare all layers for one step."""
        requests, without_room = 0, False
        for symbol, runner in self._runners.items():
            schedule = runner.begin_step(step, threads)
            requests = max(requests, schedule.shared_requests)
            without_room |= schedule.without_room
            self.sharing.kv_bytes += schedule.keys_not_read * runner.spec.signature.token_bytes * self._layers[symbol]
        self.sharing.steps += requests > 0
        self.sharing.requests += requests
        self.sharing.steps_without_room += without_room


def heads(tensor: Any, head_size: int) -> tuple[int, int]:
    """Address and elements from one token to the next, of a tensor [tokens, heads, head_size].

    Raises ValueError where the heads of a token are not side by side, as AttentionRunner.attend needs them.
    """
    if not side_by_side(tensor, head_size):
        raise ValueError(f"llmir's kernels need the heads of a token side by side, not strides {tensor.stride()}")
    return tensor.data_ptr(), tensor.stride()[0]


def side_by_side(tensor: Any, head_size: int) -> bool:
    """Whether the heads of a token of a tensor [tokens, heads, head_size] follow one another in memory."""
    _, head, element = tensor.stride()
    return element == 1 and (head == head_size or tensor.shape[1] <= 1)


def _check(layer: str, planned: AttentionSignature, found: LayerFacts) -> None:
    """Raise UnsupportedLayerError where the plan was made for a layer unlike this one."""
    pairs: dict[str, tuple[object, object]] = {
        "query heads": (planned.num_heads, found.num_heads),
        "KV heads": (planned.num_kv_heads, found.num_kv_heads),
        "head size": (planned.head_size, found.head_size),
        "window": (planned.window, found.window),
        "soft cap": (planned.soft_cap, found.soft_cap),
        "block size": (planned.block_size, found.block_size),
        "element type": (planned.element_type, found.element_type),
        "quantized cache": (planned.quantized, found.quantized),
        "sinks": (planned.sinks, found.sinks),
    }
    if not math.isclose(planned.scale, found.scale, rel_tol=SCALE_TOLERANCE):
        pairs["scale"] = (planned.scale, found.scale)
    for what, (in_plan, in_framework) in pairs.items():
        if in_plan != in_framework:
            raise UnsupportedLayerError(
                layer, f"its {what} is {in_framework} and the plan was made for {in_plan}; compile a new plan"
            )
