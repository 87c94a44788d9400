"""The plan: every decision of the compiler with its reason, and what a frontend executes.

A plan is read where neither MLIR nor torch is loaded, so it holds plain records alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmir.errors import PlanError
from llmir.ir import records
from llmir.ir.import_level import ImportLevel
from llmir.ir.kernel_spec import KernelSpec, StepPolicy
from llmir.ir.ranges import step_problems
from llmir.ir.records import RecordError

#: Raised when a field changes its meaning; a plan of another format is refused.
FORMAT = 4
#: Beside the fields of a written plan: a hash of them all.
DIGEST = "digest"


@dataclass(frozen=True)
class Decision:
    """One remark of a pass: what it decided, what it compared, and the numbers."""

    pass_name: str
    subject: str
    decision: str
    reason: str
    numbers: dict[str, Any]
    alternatives: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class PlannedKernel:
    """One kernel and the layers it serves."""

    symbol: str
    """Name of the kernel's ``llm.kernel`` in the IR."""
    spec: KernelSpec
    policy: StepPolicy
    layers: tuple[str, ...]
    """The framework's names of the attention layers."""
    object_key: str | None
    """Entry of the object cache; None where the kernel was not built, on a machine that cannot."""


@dataclass(frozen=True)
class Plan:
    """What the compiler decided for one model on one rank, and on which machine it holds."""

    format: int
    framework: str
    framework_version: str
    model: str
    rank: int
    world_size: int
    block_size: int
    """Tokens in a block of the KV cache."""
    layout: str
    """Arrangement of a page, see CacheFormat."""
    element_type: str
    """Element type of the KV cache."""
    fused: bool
    """Whether appending to the cache and attending are one call."""
    kernels: tuple[PlannedKernel, ...]
    decisions: tuple[Decision, ...]
    target: dict[str, Any]
    """The target, as Target.to_json writes it."""
    target_fingerprint: str
    """What the kernels are compiled for, see Target.fingerprint."""
    workload: dict[str, Any]
    """The workload, as Workload.summary writes it."""
    module_hash: str
    """sha256 of the module's text after all passes, remarks left out."""
    versions: dict[str, str]
    """Of llmir, the framework and the MLIR bindings."""
    import_level: ImportLevel = "full"
    """How much of the model the compiler saw."""

    def kernel_for(self, layer: str) -> PlannedKernel:
        """The kernel of the attention layer called ``layer``; PlanError if the plan has none."""
        for kernel in self.kernels:
            if layer in kernel.layers:
                return kernel
        raise PlanError(
            f"the plan for {self.model!r} has no kernel for layer {layer!r}: it is another model's, compile again"
        )

    def check_target(self, runnable: Sequence[str]) -> None:
        """Raise PlanError unless this machine, whose Target.runnable is given, runs the plan's kernels."""
        if self.target_fingerprint not in runnable:
            raise PlanError(
                f"the plan for {self.model!r} was made for a machine {self.target_fingerprint}, and this one is "
                f"{runnable[0]}: compile it again here"
            )

    def for_serving(self) -> Plan:
        """The plan without what varies from one compilation to the next: decisions' figures, measurements."""
        return replace(self, decisions=(), target={**self.target, "measured": None})

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values, with a digest by which :meth:`from_json` knows that nobody changed them."""
        fields_alone = asdict(self)
        return {**fields_alone, DIGEST: digest_of(fields_alone)}

    @classmethod
    def from_json(cls, data: Any) -> Plan:
        """The inverse of :meth:`to_json`; raises PlanError on anything else, and on a plan that no kernel can follow.

        Every way into serving passes through here: a plan file, a kept plan, one that travels with a configuration.
        """
        if not isinstance(data, dict) or "format" not in data:
            raise PlanError("this is no plan of llmir: it has no format number; make one with `llmir compile`")
        if data["format"] != FORMAT:
            raise PlanError(f"the plan has format {data['format']!r} and this llmir reads {FORMAT}: compile it again")
        fields_alone = {name: value for name, value in data.items() if name != DIGEST}
        if data.get(DIGEST) != digest_of(fields_alone):
            raise PlanError("the plan is not as llmir wrote it, its digest is of another content: compile it again")
        try:
            plan: Plan = records.read(cls, fields_alone, "plan")
        except RecordError as error:
            raise PlanError(f"the plan cannot be read: {error}; compile it again") from error
        if problems := plan.problems():
            raise PlanError(f"the plan cannot be served: {'; '.join(problems)}; compile it again")
        return plan

    def problems(self) -> list[str]:
        """What no kernel can follow, each as a clause with the field, its value and what is allowed."""
        problems = []
        for number, kernel in enumerate(self.kernels):
            problems += step_problems(kernel.spec, kernel.policy, f"plan.kernels[{number}]")
            problems += self._disagreements(kernel, f"plan.kernels[{number}]")
        if not self.kernels:
            problems.append("plan.kernels are none, and must be one at least")
        # Kernels are kept by their symbols while serving, and layers look for theirs by name.
        for what, names in (
            ("kernels' symbols", [kernel.symbol for kernel in self.kernels]),
            ("kernels' layers", [layer for kernel in self.kernels for layer in kernel.layers]),
        ):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"plan's {what} have {', '.join(twice)} more than once, and must be unique")
        if not 0 <= self.rank < self.world_size:
            problems.append(f"plan.rank is {self.rank}, and must be from 0 to below world_size, {self.world_size}")
        return problems

    def _disagreements(self, kernel: PlannedKernel, where: str) -> list[str]:
        """Where a kernel is not for the cache and the machine that the plan says."""
        s, spec = kernel.spec.attention, f"{where}.spec"
        pairs = (
            ("block_size", self.block_size, f"{spec}.attention.cache.block_size", s.cache.block_size),
            ("layout", self.layout, f"{spec}.attention.cache.layout", s.cache.layout),
            ("element_type", self.element_type, f"{spec}.attention.cache.dtype", s.cache.dtype),
            ("target_fingerprint", self.target_fingerprint.rpartition("-")[2], f"{spec}.isa", kernel.spec.isa),
        )
        return [
            f"plan.{name} is {of_plan!r}, and must be as {path}, {of_kernel!r}"
            for name, of_plan, path, of_kernel in pairs
            if of_plan != of_kernel
        ]

    def dumps(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_json(), indent=1) + "\n"

    @classmethod
    def loads(cls, text: str) -> Plan:
        """The inverse of :meth:`dumps`; raises PlanError on other text."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PlanError(
                f"this is no plan of llmir, not even JSON ({error}); make one with `llmir compile`"
            ) from error
        return cls.from_json(data)

    def write(self, path: Path) -> None:
        """Write the plan to ``path``, whole or not at all; raises PlanError where that fails."""
        unfinished = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.dumps())
            os.replace(unfinished, path)
        except OSError as error:
            if unfinished is not None:
                Path(unfinished).unlink(missing_ok=True)
            raise PlanError(
                f"the plan cannot be written to {str(path)!r} ({error.strerror}); choose another place"
            ) from error

    @classmethod
    def read(cls, path: Path) -> Plan:
        """The plan in the file ``path``; raises PlanError where there is none."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not text"
            raise PlanError(f"the plan {str(path)!r} cannot be read ({why}); make one with `llmir compile`") from error
        try:
            return cls.loads(text)
        except PlanError as error:
            raise PlanError(f"{str(path)!r}: {error}") from error


def digest_of(fields_alone: dict[str, Any]) -> str:
    """A hash of a plan's fields as JSON values, however they are spelled: sha256, hexadecimal."""
    return hashlib.sha256(json.dumps(fields_alone, sort_keys=True, default=str).encode()).hexdigest()
