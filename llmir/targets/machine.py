"""A machine, or a typical one of its kind, with its figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llmir.ir.attention_spec import AttentionSpec
from llmir.targets import host, registry
from llmir.targets.gpu import detection
from llmir.targets.records import WITHOUT_KERNELS, Cache, Hardware, Measurements, TargetError
from llmir.targets.registry import is_gpu, kind_of, unsupported


@dataclass(frozen=True, kw_only=True)
class Target(Hardware):
    """A machine: ``Target.detect()`` is this one, ``Target.named("cuda:sm_90")`` a typical one of its kind."""

    name: str
    """``cpu`` for this machine, ``gpu`` for its GPU, else the name given to :meth:`named`."""
    measured: Measurements | None = field(default=None, compare=False)
    """Figures measured on the machine; None until calibration fills them."""

    def __post_init__(self) -> None:
        known = registry.isas()
        if self.isa not in (*known, WITHOUT_KERNELS):
            raise TargetError(
                f"no instruction set {self.isa!r}, there are {', '.join(known)}: a plan that names it was made by "
                f"another version of llmir, compile it again"
            )
        if self.cores < 1:
            raise TargetError(f"a target needs at least one core, not {self.cores}")

    @classmethod
    def detect(cls, root: Path = Path("/")) -> Target:
        """This machine's CPU, read from ``/proc`` and ``/sys`` below ``root``; nothing is measured yet."""
        return cls(name="cpu", **vars(host.detect(root)))

    @classmethod
    def named(cls, name: str) -> Target:
        """The target called ``name``: ``cpu`` is this machine, ``gpu`` its GPU; ``cpu:ISA``, ``cuda:ARCHITECTURE`` and
        ``hip:ARCHITECTURE`` are typical ones, with published figures.

        Raises TargetError for any other name, and for ``gpu`` where there is none that kernels are made for.
        """
        if name == "cpu":
            return cls.detect()
        if name == "gpu":
            return cls(name="gpu", **vars(detection.detect()))
        typical = registry.typical_machines()
        if name in typical:
            return cls(name=name, **vars(typical[name]))
        raise TargetError(f"no target {name!r}; use one of cpu, gpu, {', '.join(sorted(typical))}")

    @property
    def fingerprint(self) -> str:
        """What compiled kernels depend on: architecture, and instruction set or a GPU's own architecture."""
        return f"{self.machine}-{self.isa}"

    def builds_on(self, host: Target) -> bool:
        """Whether ``host`` can compile this CPU's kernels: code for any instruction set of its own architecture."""
        return not is_gpu(self.isa) and self.machine == host.machine

    @property
    def runnable(self) -> tuple[str, ...]:
        """Fingerprints of the targets whose kernels this machine can run: its own first, then those of lesser
        instruction sets."""
        lesser = [isa for isa in registry.isas(on_gpu=False) if isa != self.isa and self.runs(isa)]
        return (self.fingerprint, *(replace(self, isa=isa).fingerprint for isa in lesser))

    def runs(self, isa: str) -> bool:
        """Whether this machine can run kernels made for ``isa``: a GPU those of its architecture, a CPU those of any
        instruction set it has."""
        return isa in registry.isas() and kind_of(isa).runs(isa, self)

    def supports(self, spec: AttentionSpec) -> list[str]:
        """Why there is no kernel of ``spec`` for this machine, every reason a clause; none where there is one."""
        return unsupported(spec, self.isa)

    def runs_on(self, host: Target) -> bool:
        """Whether ``host`` can run this target's kernels."""
        return (is_gpu(self.isa) or self.machine == host.machine) and host.runs(self.isa)

    def unused(self) -> str:
        """What this machine has that would make serving faster and no kernel uses; empty where there is nothing."""
        return "" if self.isa == WITHOUT_KERNELS else kind_of(self.isa).unused(self)

    def missing(self) -> str:
        """What this machine would need to run kernels of a CPU; empty where it can run some."""
        if self.isa != WITHOUT_KERNELS:
            return ""
        least = [kind.typical[kind.isas[-1]] for kind in registry.KINDS if not kind.on_gpu]
        known = " and ".join(f"{one.machine} processors with {', '.join(one.features)}" for one in least)
        of_kind = (one.features for one in least if one.machine == self.machine)
        lacks = [feature for feature in next(of_kind, ()) if feature not in self.features]
        what = f"lacks {', '.join(lacks)}" if lacks else "is another kind"
        return (
            f"llmir has kernels for {known}, and this one ({self.model}, {self.machine}) {what}: serve on a GPU or "
            f"without llmir here; to compile for another machine, name its target, such as cpu:avx2"
        )

    @property
    def figures(self) -> Measurements:
        """The measured figures, or published ones for this instruction set and number of cores.

        ``origin`` says which.
        """
        if self.measured is not None:
            return self.measured
        if self.isa == WITHOUT_KERNELS:
            raise TargetError(self.missing())
        chip = kind_of(self.isa).published[self.isa]
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

    def is_same_machine(self, other: Target) -> bool:
        """Whether both are one machine, if with other cores or another of its instruction sets."""
        return (self.machine, self.model, self.features) == (other.machine, other.model, other.features)

    def with_isa(self, isa: str) -> Target:
        """The same machine, used with instruction set ``isa``; its figures have to be measured anew.

        Raises TargetError where it does not have ``isa``.
        """
        if not self.runs(isa):
            choices = ", ".join(name.removeprefix(f"{self.machine}-") for name in self.runnable)
            raise TargetError(f"this machine ({self.model}) has {self.isa} and cannot run {isa}: choose from {choices}")
        return replace(self, isa=isa, measured=None)

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
