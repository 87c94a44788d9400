"""What every attention backend does with a plan: a kernel for each layer, one work list a step, addresses of tensors.

Knows no framework and needs no torch: tensors are whatever has torch's ``stride``, ``shape`` and ``data_ptr``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, Protocol, TypeVar

from llmir.errors import UnsupportedLayerError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import KernelSpec
from llmir.plan import Plan, PlannedKernel
from llmir.runtime.schedule import Schedule
from llmir.runtime.step import Step

#: A framework may have computed a layer's scale in another order than when the plan was made.
SCALE_TOLERANCE = 1e-6


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
    """What runs a kernel: CpuAttentionRunner on a CPU, GpuAttentionRunner on a GPU."""

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

    def bind(self, layer: str, found: AttentionSpec) -> RunnerT:
        """What computes the layer that the framework calls ``layer``; layers of one kernel get the same.

        Raises PlanError where the plan has no such layer, UnsupportedLayerError where its layer is unlike ``found``,
        KernelError where the kernel cannot be loaded.
        """
        kernel = self._plan.kernel_for(layer)
        _check(layer, kernel.spec.attention, found)
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
            token_bytes = runner.spec.attention.cache.token_bytes * self._layers[symbol]
            self.sharing.kv_bytes += schedule.keys_not_read * token_bytes
        self.sharing.steps += requests > 0
        self.sharing.requests += requests
        self.sharing.steps_without_room += without_room


def heads(tensor: Any, head_size: int) -> tuple[int, int]:
    """Address and elements from one token to the next, of a tensor [tokens, heads, head_size].

    Raises ValueError where the heads of a token are not side by side, as CpuAttentionRunner.attend needs them.
    """
    if not side_by_side(tensor, head_size):
        raise ValueError(f"llmir's kernels need the heads of a token side by side, not strides {tensor.stride()}")
    return tensor.data_ptr(), tensor.stride()[0]


def side_by_side(tensor: Any, head_size: int) -> bool:
    """Whether the heads of a token of a tensor [tokens, heads, head_size] follow one another in memory."""
    _, head, element = tensor.stride()
    return element == 1 and (head == head_size or tensor.shape[1] <= 1)


def _check(layer: str, planned: AttentionSpec, found: AttentionSpec) -> None:
    """Raise UnsupportedLayerError where the plan was made for a layer unlike this one; its layout is the plan's own."""
    in_plan, in_framework = dict(_fields(planned)), dict(_fields(found.with_cache(layout=planned.cache.layout)))
    if math.isclose(planned.scale, found.scale, rel_tol=SCALE_TOLERANCE):
        in_framework["scale"] = planned.scale
    differing = [name for name, value in in_framework.items() if value != in_plan[name]]
    if differing:
        found_words = ", ".join(f"{name} {in_framework[name]}" for name in differing)
        plan_words = ", ".join(f"{name} {in_plan[name]}" for name in differing)
        raise UnsupportedLayerError(
            layer, f"it has {found_words}, and the plan was made for {plan_words}; compile a new plan"
        )


def _fields(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a record's fields, those of records in it with dots."""
    for field in fields(record):
        value = getattr(record, field.name)
        if is_dataclass(value):
            yield from _fields(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value
