"""A machine, or a typical one of its kind, with its figures."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llmir.ir.signature import is_gpu
from llmir.target import cpu, gpu, gpu_detection
from llmir.target.records import Cache, Hardware, Measurements, TargetError

_NAMED = {**cpu.NAMED, **gpu.NAMED}
_PUBLISHED = {**cpu.PUBLISHED, **gpu.PUBLISHED}


@dataclass(frozen=True, kw_only=True)
class Target(Hardware):
    """A machine: ``Target.detect()`` is this one, ``Target.named("cuda:sm_90")`` a typical one of its kind."""

    name: str
    """``cpu`` for this machine, ``gpu`` for its GPU, else the name given to :meth:`named`."""
    measured: Measurements | None = field(default=None, compare=False)
    """Figures measured on the machine; None until calibration fills them."""

    def __post_init__(self) -> None:
        if self.isa not in _PUBLISHED:
            raise TargetError(f"no instruction set {self.isa!r}; there are {', '.join(_PUBLISHED)}")
        if self.cores < 1:
            raise TargetError(f"a target needs at least one core, not {self.cores}")

    @classmethod
    def detect(cls, root: Path = Path("/")) -> Target:
        """This machine's CPU, read from ``/proc`` and ``/sys`` below ``root``; nothing is measured yet."""
        return cls(name="cpu", **vars(cpu.detect(root)))

    @classmethod
    def named(cls, name: str) -> Target:
        """The target called ``name``: ``cpu`` is this machine, ``gpu`` its GPU; ``cpu:ISA``, ``cuda:ARCHITECTURE`` and
        ``hip:ARCHITECTURE`` are typical ones, with published figures.

        Raises TargetError for any other name, and for ``gpu`` where there is none that kernels are made for.
        """
        if name == "cpu":
            return cls.detect()
        if name == "gpu":
            return cls(name="gpu", **vars(gpu_detection.detect()))
        if name in _NAMED:
            return cls(name=name, **vars(_NAMED[name]))
        raise TargetError(f"no target {name!r}; use one of cpu, gpu, {', '.join(sorted(_NAMED))}")

    @cached_property
    def fingerprint(self) -> str:
        """What compiled kernels depend on: of a GPU its architecture; of a CPU architecture, best instruction set and a
        hash of the features.

        A plan fits exactly the machines with its fingerprint: its kernels may use any feature of the machine
        they were compiled on.
        """
        if is_gpu(self.isa):
            return f"{self.machine}-{self.isa}"
        best = next(isa for isa in cpu.ISAS if cpu.ISA_FEATURES[isa] <= set(self.features))
        digest = hashlib.sha256(" ".join(self.features).encode()).hexdigest()[:8]
        return f"{self.machine}-{best}-{digest}"

    def runs_on(self, host: Target) -> bool:
        """Whether ``host`` can run this target's kernels: a GPU those of its architecture, a CPU those of its
        instruction sets, which the JIT, that compiles for its host alone, can then build there."""
        if is_gpu(self.isa):
            return self.isa == host.isa
        return self.machine == host.machine and cpu.ISA_FEATURES[self.isa] <= set(host.features)

    @property
    def figures(self) -> Measurements:
        """The measured figures, or published ones for this instruction set and number of cores.

        ``origin`` says which.
        """
        if self.measured is not None:
            return self.measured
        chip = _PUBLISHED[self.isa]
        together = min(chip.read_bandwidth_all, self.cores * chip.read_bandwidth)
        pieces, cached = (
            tuple((size, rate / chip.threads * self.cores) for size, rate in curve)
            for curve in (chip.piece_bandwidth, chip.cached_bandwidth)
        )
        return replace(
            chip,
            read_bandwidth_all=together,
            piece_bandwidth=pieces,
            cached_bandwidth=cached,
            threads=self.cores,
        )

    def with_measurements(self, measured: Measurements) -> Target:
        """The same machine with its figures filled in."""
        return replace(self, measured=measured)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Target:
        """The inverse of :meth:`to_json`; raises TargetError on other data."""
        try:
            measured = data["measured"]
            if measured is not None:
                curves = {
                    name: tuple((int(size), float(rate)) for size, rate in measured[name])
                    for name in ("piece_bandwidth", "cached_bandwidth")
                }
                measured = Measurements(**{**measured, **curves})
            caches = tuple(Cache(**cache) for cache in data["caches"])
            features = tuple(data["features"])
            return cls(**{**data, "features": features, "caches": caches, "measured": measured})
        except (KeyError, TypeError, ValueError) as error:
            raise TargetError(f"this is no target of llmir ({error!r}); detect or calibrate it again") from error
