"""What to compare, checked before anything is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmir.compare.frameworks import framework_named
from llmir.compare.quality import QualityTask
from llmir.compare.workloads import workload_named
from llmir.errors import LlmirError

#: Step in which the maximum model length is chosen, so that it does not depend on a workload's last token.
_LENGTH_STEP = 1024
#: What weights and caches may be served in; the framework itself may know fewer.
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class CompareOptions:
    """A comparison of one framework with and without llmir.

    Raises :class:`LlmirError` for values that cannot work: no such workload, framework or
    dtype, no such model folder, a model too short for a workload, a workload that another framework makes.
    """

    model: str
    """Folder of a Hugging Face model, or its name on the hub."""
    framework: str = "vllm"
    workloads: tuple[str, ...] | None = None
    """None: the framework's own."""
    left_out: tuple[str, ...] = ()
    """Workloads that are not run after all; the engine arguments are as if they were."""
    dtype: str | None = None
    """Of weights and caches, the same on both sides; None: the framework's fastest on this machine."""
    pairs: int | None = None
    """Pairs of processes, one of each side; None: as many as the framework says."""
    repeats: int | None = None
    """Timed runs of a workload in one process; None: as many as the workload says."""
    quality: bool = True
    seed: int = 0
    warm_up: bool = True
    """Whether each process serves something untimed first."""
    kv_cache_bytes: int = 4 << 30
    """Memory of the KV cache, the same on both sides, for a framework that sizes it in bytes."""
    engine: Mapping[str, Any] = field(default_factory=dict)
    """More engine arguments, for both sides; they win over what is chosen here."""
    llmir_engine: Mapping[str, Any] | None = None
    """What the llmir side has on top; None: the flag."""
    quality_task: QualityTask = field(default_factory=QualityTask)
    timeout_seconds: float = 3600.0
    """For one process; a framework that hangs must not hang the comparison."""

    def __post_init__(self) -> None:
        if not self.runs() and not self.quality:
            raise LlmirError("there is nothing to compare: name a workload or ask for quality")
        if self.pair_count() < 1 or (self.repeats is not None and self.repeats < 1):
            raise LlmirError("a comparison needs at least one pair and one repeat (three pairs for figures to trust)")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise LlmirError(f"there is no dtype {self.dtype!r}; choose from {', '.join(DTYPES)}")
        self._check_framework()
        self._check_model()

    def pair_count(self) -> int:
        """Pairs of processes, one of each side."""
        return framework_named(self.framework).pairs if self.pairs is None else self.pairs

    def runs(self) -> dict[str, int]:
        """Timed runs of each workload in one process."""
        names = [name for name in self._all_workloads() if name not in self.left_out]
        return {name: self.repeats or workload_named(name).repeats for name in names}

    def arguments(self, side: str) -> dict[str, Any]:
        """Engine arguments of side ``"baseline"`` or ``"llmir"``."""
        framework = framework_named(self.framework)
        common = framework.arguments(self._max_model_len(), self.kv_cache_bytes)
        if self.dtype is not None:
            common["dtype"] = self.dtype
        if side == "baseline":
            return {**common, **framework.baseline, **self.engine}
        return {**common, **self.engine, **(framework.llmir if self.llmir_engine is None else self.llmir_engine)}

    def _all_workloads(self) -> tuple[str, ...]:
        return framework_named(self.framework).workloads if self.workloads is None else self.workloads

    def _max_model_len(self) -> int:
        steps = -(-self._longest()[0] // _LENGTH_STEP) * _LENGTH_STEP
        limit = self._model_limit()
        return min(steps, limit) if limit else steps

    def _longest(self) -> tuple[int, str]:
        """Tokens of the longest request, and what asks for it."""
        lengths = [(workload_named(name).longest(), f"workload {name}") for name in self._all_workloads()]
        if self.quality:
            lengths.append((self.quality_task.longest(), "the quality check"))
        return max(lengths)

    def _check_framework(self) -> None:
        for name in self.runs():
            only = workload_named(name).framework
            if only is not None and only != self.framework:
                titles = framework_named(only).title, framework_named(self.framework).title
                raise LlmirError(
                    f"workload {name} is made by {titles[0]}'s own generator, which {titles[1]} does not have;"
                    f" run it with: llmir compare {only}"
                )

    def _check_model(self) -> None:
        folder = Path(self.model)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise LlmirError(f"{folder} is not a model folder: it has no config.json; name the folder of a model")
        # A name like "org/model" may be on the hub, unless the first part is a folder here.
        if not folder.is_dir() and (folder.is_absolute() or folder.parent.is_dir()):
            raise LlmirError(f"there is no model {folder}; name a folder with a model, or a model on the hub")
        needed, who = self._longest()
        limit = self._model_limit()
        if limit and needed > limit:
            raise LlmirError(f"{who} needs {needed} tokens, {self.model} takes {limit}; choose other workloads")

    def _model_limit(self) -> int | None:
        """Longest sequence the model's configuration allows, where it is at hand and says so."""
        path = Path(self.model, "config.json")
        if not path.is_file():
            return None
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LlmirError(f"{path} cannot be read ({error}); fetch the model again") from error
        return config.get("max_position_embeddings")
