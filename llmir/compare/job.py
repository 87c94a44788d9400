"""What the parent hands to a worker process and gets back, as JSON files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from llmir.compare.measuring import RequestRecord
from llmir.compare.quality import Answers, QualityTask

#: Steps of a process beside its workloads, which are called by their names.
READY, QUALITY = "ready", "quality"


def steps(runs: Iterable[str], with_quality: bool) -> list[str]:
    """What a process does, in order. It announces each when it is done, in a line that begins with the step."""
    return [READY, *runs, *([QUALITY] if with_quality else [])]


def announced_step(line: str) -> str:
    """The step that a line of a process says is done."""
    return line.split(" ", 1)[0]


@dataclass(frozen=True)
class Job:
    """One side, for one process."""

    framework: str
    model: str
    arguments: dict[str, Any]
    """Engine arguments, this side's own among them."""
    runs: dict[str, int]
    """Timed runs of each workload, by its name."""
    seed: int
    warm_up: bool
    """Whether something is served before the first workload that is not timed."""
    allotted: float | None
    """Seconds for everything, from ``started`` on: a workload that would go beyond is left out. None: all are run."""
    quality: QualityTask | None
    started: float
    """When the process was started, seconds of the machine's monotonic clock."""
    result_path: str

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Job:
        """The inverse of :meth:`to_json`."""
        quality = QualityTask(**data["quality"]) if data["quality"] else None
        return cls(**{**data, "quality": quality})


@dataclass(frozen=True)
class StartUp:
    """Where the time from the start of the process to the first servable request went, in seconds."""

    import_seconds: float
    """Interpreter and framework imports."""
    engine_seconds: float
    """Plugins, model loading, compilation or its cache, cache allocation."""
    total_seconds: float


@dataclass(frozen=True)
class Result:
    """What one process measured."""

    start_up: StartUp
    versions: dict[str, str]
    """Of Python and of the packages that matter, by distribution."""
    settings: dict[str, Any]
    runs: dict[str, list[list[RequestRecord]]]
    """For each workload that was run the records of each timed run."""
    answers: Answers | None

    def cached_tokens(self, workload: str) -> float:
        """Prompt tokens that a request of the workload's timed runs took from the prefix cache, on average."""
        return mean(record.cached_tokens for records in self.runs[workload] for record in records)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Result:
        """The inverse of :meth:`to_json`."""
        runs = {
            name: [[RequestRecord.from_json(record) for record in records] for records in repeats]
            for name, repeats in data["runs"].items()
        }
        answers = Answers.from_json(data["answers"]) if data["answers"] else None
        return cls(StartUp(**data["start_up"]), data["versions"], data["settings"], runs, answers)
