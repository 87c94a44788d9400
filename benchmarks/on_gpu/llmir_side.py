"""llmir's kernels as benchmarks/gpu.py runs them: from plans made before, on a machine that needs no MLIR."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from llmir.errors import PlanError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import GpuVariant, KernelSpec, StepPolicy
from llmir.plan import Plan, PlannedKernel
from llmir.runtime import step as runtime
from llmir.runtime.gpu import GpuAttentionRunner, StepLimits
from llmir.runtime.schedule import Schedule
from on_gpu.batches import Shape
from on_gpu.step import PLAIN, Features, Step

PLANS = Path(__file__).resolve().parent.parent / "plans"


def target_of(device: torch.device) -> str:
    """The named target of a device, as folders of plans are called: ``cuda-sm_90``.

    Where there is no GPU, that of an H100.
    """
    if device.type != "cuda":
        return "cuda-sm_90"
    if torch.version.hip:
        return f"hip-{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    return "cuda-sm_{}{}".format(*torch.cuda.get_device_capability(device))


@dataclass(frozen=True)
class Planned:
    """One kernel to run, and where its decisions come from."""

    spec: KernelSpec
    policy: StepPolicy
    source: str
    """Name of the plan, "like " before it where the plan is for another attention and its tiles were fitted to this."""

    def as_kernel(self) -> PlannedKernel:
        """As a plan holds it."""
        return PlannedKernel(self.spec.symbol, self.spec, self.policy, (), None)


class Plans:
    """The plans in a folder. PlanError where there are none for a GPU."""

    def __init__(self, folder: Path):
        self._kernels: list[tuple[str, PlannedKernel]] = []
        for path in sorted(folder.glob("*.json")):
            self._kernels += [(path.stem, kernel) for kernel in Plan.read(path).kernels if kernel.spec.gpu_variants]
        if not self._kernels:
            raise PlanError(
                f"{str(folder)!r} holds no plan for a GPU: make some with `llmir compile --target`, or name another "
                "folder with --plans"
            )

    @property
    def names(self) -> list[str]:
        """Of the plans, as their files are called."""
        return list(dict.fromkeys(name for name, _ in self._kernels))

    @property
    def block_size(self) -> int:
        """Tokens in a block of the largest blocks that any of the plans has."""
        return max(kernel.spec.attention.cache.block_size for _, kernel in self._kernels)

    def kernel(self, shape: Shape, features: Features = PLAIN) -> Planned:
        """The kernel of an attention: of a plan that has it, or of the plan most like it, its tiles fitted."""

        def unlike(entry: tuple[str, PlannedKernel]) -> tuple[bool, int, int, int]:
            planned = entry[1].spec.attention
            wanted = _wanted(planned, shape, features)
            group = shape.num_heads // shape.num_kv_heads
            others = sum(getattr(planned, field.name) != getattr(wanted, field.name) for field in fields(planned))
            return (
                planned != wanted,
                abs(planned.head_size - shape.head_size),
                abs(planned.queries_per_kv - group),
                others,
            )

        name, kernel = min(self._kernels, key=unlike)
        attention = _wanted(kernel.spec.attention, shape, features)
        if attention == kernel.spec.attention:
            return Planned(kernel.spec, kernel.policy, name)
        variants = tuple(
            fitted(variant, attention, kernel.spec.attention.head_size) for variant in kernel.spec.gpu_variants
        )
        return Planned(replace(kernel.spec, attention=attention, variants=variants), kernel.policy, f"like {name}")


def _wanted(planned: AttentionSpec, shape: Shape, features: Features) -> AttentionSpec:
    """The attention of ``shape`` with ``features``, in blocks of their size or of the plan's."""
    return AttentionSpec.dense(
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_size=shape.head_size,
        dtype=features.element_type,
        block_size=features.block_size or planned.cache.block_size,
        scale=shape.head_size**-0.5,
        window=features.window,
        soft_cap=features.soft_cap,
        layout=planned.cache.layout,
        quantized=features.quantized,
        sinks=features.sinks,
    )


#: Least rows and keys of a tile that matrix units take.
_LEAST_TILE = 16


def fitted(variant: GpuVariant, attention: AttentionSpec, planned_size: int) -> GpuVariant:
    """A variant of a plan for another attention: as many rows as a token's heads need, and fewer keys a tile where
    heads are larger, so that tiles of both take no more shared memory."""
    rows = max(variant.row_tile, power_of_two(attention.queries_per_kv))
    shrink = max(1, power_of_two(attention.head_size) // power_of_two(planned_size))
    chunk = max(_LEAST_TILE, variant.key_chunk // shrink)
    tokens = max(1, rows // attention.queries_per_kv)
    return replace(variant, row_tile=rows, key_chunk=chunk, max_tokens=tokens)


def power_of_two(number: int) -> int:
    """The least power of two that is no less."""
    return 1 << (number - 1).bit_length()


class LlmirSide:
    """llmir's kernel on a step, its keys and values in the cache already."""

    def __init__(self, name: str, planned: Planned, step: Step, runner: GpuAttentionRunner, pages: torch.Tensor):
        self.name, self._step, self._runner, self._pages = name, step, runner, list(pages)
        block_size = planned.spec.attention.cache.block_size
        self._host_table, self._table = step.host_table(block_size), step.table(block_size)
        nothing = step.query.new_empty(0, step.shape.num_kv_heads, step.shape.head_size)
        self._new = (nothing, nothing, torch.empty(0, dtype=torch.int64, device=step.device))
        self.output = step.output()
        self.schedule: Schedule | None = None

    def prepare(self) -> None:
        """The work list: what the host does once a step, for all layers."""
        self.schedule = self._runner.begin_step(runtime.Step(*self._step.host, self._host_table))

    def prepare_other(self) -> None:
        """Another step, of the same requests in other blocks: so that the next is not like the one before it."""
        self._runner.begin_step(runtime.Step(*self._step.host, np.roll(self._host_table, 1, axis=0)))

    def run(self, layer: int) -> None:
        """Attention of one layer."""
        key, value, slots = self._new
        self._runner.attend(
            self._step.query, key, value, self.output, self._pages[layer], self._table, slots, append_tokens=0
        )


SHARING_ON, SHARING_OFF = "llmir", "llmir, sharing off"


class Runners:
    """Runners of kernels, each made once: making one compiles its programs."""

    def __init__(self, limits: StepLimits, device: torch.device):
        self._limits, self._device = limits, device
        self._made: dict[tuple[KernelSpec, StepPolicy], GpuAttentionRunner] = {}

    def runner(self, planned: Planned) -> GpuAttentionRunner:
        """What runs a kernel."""
        key = (planned.spec, planned.policy)
        if key not in self._made:
            self._made[key] = GpuAttentionRunner.load(planned.as_kernel(), self._limits, self._device)
        return self._made[key]

    def sides(self, planned: Planned, step: Step) -> list[LlmirSide]:
        """llmir on a step: as planned; and reading nothing once for several requests, where requests share anything."""
        pages = step.pages(planned.spec.attention.cache.block_size)
        policies = {SHARING_ON: planned.policy}
        if step.batch.shared:
            policies[SHARING_OFF] = replace(planned.policy, sharing=None)
        return [
            LlmirSide(name, planned, step, self.runner(replace(planned, policy=policy)), pages)
            for name, policy in policies.items()
        ]
