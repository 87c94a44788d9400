"""The machine a plan is made for: instruction set, caches, cores, and how fast they are."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from llmir.errors import LlmirError

Isa = Literal["avx512_bf16", "avx512", "plain"]
ISAS: tuple[Isa, ...] = ("avx512_bf16", "avx512", "plain")

#: What the kernels of an instruction set need; the first row a machine satisfies is its instruction set.
ISA_FEATURES: dict[Isa, frozenset[str]] = {
    "avx512_bf16": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}),
    "avx512": frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
    "plain": frozenset(),
}

#: CPU flags a code generator for the host may use; the others (virtualization, power, bug workarounds) change no code.
_CODE_FEATURES = re.compile(
    r"(s?sse\d?(_[12])?|pni|ssse3|sse4a|avx.*|amx.*|fma4?|f16c|bmi[12]|abm|lzcnt|popcnt|movbe|adx|aes|vaes|"
    r"pclmulqdq|vpclmulqdq|gfni|sha_ni|cx16|rdrand|rdseed|rdpid|clflushopt|clwb|prfchw|3dnowprefetch|xop|tbm|"
    r"xsave.*|fsgsbase|movdiri|movdir64b|serialize|asimd.*|sve.*|bf16|i8mm|fp|fphp)"
)


class TargetError(LlmirError):
    """A target's name is not known, or a target is not the machine that was asked to compile for it."""


@dataclass(frozen=True)
class Cache:
    """One level of data cache."""

    level: int
    bytes: int
    """Size of one instance."""
    shared_by: int
    """Logical CPUs that share an instance."""


@dataclass(frozen=True)
class Measurements:
    """How fast a machine reads memory, multiplies, and starts its threads.

    Bandwidths in bytes a second, rates in floating-point operations a second (a multiply-add is two).
    """

    read_bandwidth: float
    """Streaming read of one thread."""
    read_bandwidth_all: float
    """Streaming read of ``threads`` threads together."""
    piece_bandwidth: tuple[tuple[int, float], ...]
    """(bytes of a piece, bandwidth of ``threads`` threads together), ascending.

    Pages of two contiguous pieces, keys and values, are read in random order, as attention reads a KV cache.
    """
    cached_bandwidth: tuple[tuple[int, float], ...]
    """(bytes of a working set, bandwidth of ``threads`` threads together), ascending.

    The threads read the same pages again and again, as requests do that share a prefix.
    """
    bf16_rate: float
    """bfloat16 dot products accumulated in float32, one thread; the float32 rate where there is no instruction."""
    f32_rate: float
    """float32 multiply-adds, one thread."""
    fork_join_seconds: float
    """Starting ``threads`` threads on an empty task and waiting for them."""
    threads: int
    origin: str
    """Where the figures come from, for a reader."""

    def __post_init__(self) -> None:
        figures = [self.read_bandwidth, self.read_bandwidth_all, self.bf16_rate, self.f32_rate]
        for name in ("piece_bandwidth", "cached_bandwidth"):
            sizes = [size for size, _ in getattr(self, name)]
            if not sizes or sizes != sorted(set(sizes)) or min(sizes) <= 0:
                raise TargetError(f"{name} needs ascending sizes in bytes, not {sizes}")
            figures += [rate for _, rate in getattr(self, name)]
        if min(figures) <= 0 or self.fork_join_seconds < 0:
            raise TargetError(f"the figures of a target must be positive ({self.origin}); calibrate it again")

    def piece_rate(self, piece_bytes: int) -> float:
        """Bandwidth in bytes a second of all threads that read pieces of ``piece_bytes`` in random order.

        Between two measured sizes the time per piece is linear in its size (a fixed cost to find a piece, then
        a stream); below the smallest, that fixed cost stays; above the largest, its bandwidth does. No piece is
        faster than a stream: where one was measured to be, something slowed the stream.
        """
        return min(self._piece_rate(piece_bytes), self.read_bandwidth_all)

    def _piece_rate(self, piece_bytes: int) -> float:
        points = self.piece_bandwidth
        smallest, largest = points[0], points[-1]
        if piece_bytes >= largest[0]:
            return largest[1]
        if piece_bytes <= smallest[0]:
            found = max(0.0, smallest[0] / smallest[1] - smallest[0] / self.read_bandwidth_all)
            return piece_bytes / (found + piece_bytes / self.read_bandwidth_all)
        upper = next(i for i, (size, _) in enumerate(points) if size >= piece_bytes)
        (low, low_rate), (high, high_rate) = points[upper - 1], points[upper]
        share = (piece_bytes - low) / (high - low)
        return piece_bytes / ((1 - share) * low / low_rate + share * high / high_rate)


@dataclass(frozen=True)
class Target:
    """A machine: ``Target.detect()`` is this one, ``Target.named("cpu:avx512")`` a typical one of its kind."""

    name: str
    """``cpu`` for this machine, else the name given to :meth:`named`."""
    isa: Isa
    """One of :data:`ISAS`."""
    machine: str
    """Processor architecture as the kernel calls it, such as ``x86_64``."""
    model: str
    """Processor model, for a reader."""
    features: tuple[str, ...]
    """CPU features that a code generator may use, sorted."""
    cores: int
    """Physical cores this process may run on."""
    caches: tuple[Cache, ...]
    """Data caches, ascending level."""
    measured: Measurements | None = field(default=None, compare=False)
    """Figures measured on the machine; None until calibration fills them."""

    def __post_init__(self) -> None:
        if self.isa not in ISAS:
            raise TargetError(f"no instruction set {self.isa!r}; there are {', '.join(ISAS)}")
        if self.cores < 1:
            raise TargetError(f"a target needs at least one core, not {self.cores}")

    @classmethod
    def detect(cls, root: Path = Path("/")) -> Target:
        """This machine, read from ``/proc`` and ``/sys`` below ``root``; nothing is measured yet."""
        model, flags = _cpuinfo(root)
        cpus = sorted(os.sched_getaffinity(0))
        features = tuple(sorted(flag for flag in flags if _CODE_FEATURES.fullmatch(flag)))
        isa = next(isa for isa in ISAS if ISA_FEATURES[isa] <= flags)
        return cls("cpu", isa, platform.machine(), model, features, _cores(root, cpus), _caches(root, cpus[0]))

    @classmethod
    def named(cls, name: str) -> Target:
        """The target called ``name``: ``cpu`` is this machine; ``cpu:ISA`` a typical one, with published figures.

        Raises TargetError for any other name.
        """
        if name == "cpu":
            return cls.detect()
        if name in _NAMED:
            return _NAMED[name]
        raise TargetError(f"no target {name!r}; use one of cpu, {', '.join(sorted(_NAMED))}")

    @cached_property
    def fingerprint(self) -> str:
        """What compiled kernels depend on: architecture, best instruction set, a hash of the CPU features.

        A plan fits exactly the machines with its fingerprint: its kernels may use any feature of the machine
        they were compiled on.
        """
        best = next(isa for isa in ISAS if ISA_FEATURES[isa] <= set(self.features))
        digest = hashlib.sha256(" ".join(self.features).encode()).hexdigest()[:8]
        return f"{self.machine}-{best}-{digest}"

    def runs_on(self, host: Target) -> bool:
        """Whether ``host`` has the instruction set of this target, so that the JIT, which compiles for its host
        alone, can build this target's kernels there."""
        return self.machine == host.machine and ISA_FEATURES[self.isa] <= set(host.features)

    @property
    def figures(self) -> Measurements:
        """The measured figures, or published ones for this instruction set and number of cores.

        ``origin`` says which.
        """
        if self.measured is not None:
            return self.measured
        socket = _PUBLISHED[self.isa]
        together = min(socket.read_bandwidth_all, self.cores * socket.read_bandwidth)
        pieces, cached = (
            tuple((size, rate / socket.threads * self.cores) for size, rate in curve)
            for curve in (socket.piece_bandwidth, socket.cached_bandwidth)
        )
        return replace(
            socket,
            read_bandwidth_all=together,
            piece_bandwidth=pieces,
            cached_bandwidth=cached,
            threads=self.cores,
        )

    def cache_bytes(self, level: int) -> int:
        """Bytes of one cache of ``level``, 0 where the machine has none or does not tell."""
        return next((cache.bytes for cache in self.caches if cache.level == level), 0)

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


def _cpuinfo(root: Path) -> tuple[str, frozenset[str]]:
    """Model name and CPU flags of the first processor."""
    facts: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name", "unknown processor"), frozenset(flags.split())


def _cores(root: Path, cpus: list[int]) -> int:
    """Physical cores behind the logical CPUs ``cpus``."""
    found = set()
    for cpu in cpus:
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        core = _read(topology / "core_id") or f"cpu{cpu}"
        found.add((_read(topology / "physical_package_id"), core))
    return max(1, len(found))


def _caches(root: Path, cpu: int) -> tuple[Cache, ...]:
    """Data caches that logical CPU ``cpu`` reads through."""
    found = []
    for index in sorted((root / f"sys/devices/system/cpu/cpu{cpu}/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size"))
        if size and _read(index / "type") in ("Data", "Unified"):
            unit = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[2]]
            sharers = _cpu_list_length(_read(index / "shared_cpu_list"))
            found.append(Cache(int(_read(index / "level")), int(size[1]) * unit, sharers))
    return tuple(sorted(found, key=lambda cache: cache.level))


def _cpu_list_length(text: str) -> int:
    """Number of CPUs in a kernel list such as ``0-3,8``; at least 1."""
    total = 0
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        total += int(last or first) - int(first) + 1
    return max(1, total)


def _read(path: Path) -> str:
    """Text of a kernel file, empty where the machine does not have it."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


#: Cost of starting a piece at a random place: a DRAM access after a page walk that misses too.
_ACCESSES_PER_PIECE = 2
#: Piece sizes the published bandwidths are worked out for, the range a page of a KV cache takes.
_PIECES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
#: Working sets the published bandwidths are worked out for.
_WORKING_SETS = tuple((128 << 10) << i for i in range(10))
#: OpenMP fork-join of a socket, the order of EPCC's OpenMP micro-benchmarks; calibration replaces it.
_FORK_JOIN_SECONDS = 10e-6
_CACHE_LINE = 64
_TYPICAL_CACHES: dict[Isa, tuple[Cache, ...]] = {
    "avx512_bf16": (Cache(1, 32 << 10, 1), Cache(2, 1 << 20, 1), Cache(3, 32 << 20, 8)),
    "avx512": (Cache(1, 48 << 10, 1), Cache(2, 1280 << 10, 1), Cache(3, 60 << 20, 40)),
    "plain": (Cache(1, 32 << 10, 1), Cache(2, 512 << 10, 1), Cache(3, 32 << 20, 8)),
}


def _published(
    isa: Isa,
    source: str,
    cores: int,
    gigahertz: float,
    socket_bandwidth: float,
    misses: int,
    latency: float,
    f32_per_cycle: int,
    bf16_per_cycle: int,
    cached_per_cycle: tuple[int, int],
) -> Measurements:
    """Figures worked out from a data sheet.

    One thread streams as many cache lines as it has miss buffers, each memory latency (seconds) long (Little's
    law), and never more than the socket's bandwidth (bytes a second). ``cached_per_cycle``: bytes that a core reads
    in a cycle from its second-level cache, and from the last one; larger working sets are read from memory.
    """
    one = min(socket_bandwidth, misses * _CACHE_LINE / latency)
    together = min(socket_bandwidth, one * cores)
    pieces = tuple((size, size / (_ACCESSES_PER_PIECE * latency + size / one) * cores) for size in _PIECES)
    second, last = _TYPICAL_CACHES[isa][1:]
    all_cycles = cores * gigahertz * 1e9

    def cached(size: int) -> float:
        if size <= second.bytes:
            return cached_per_cycle[0] * all_cycles
        return cached_per_cycle[1] * all_cycles if size <= last.bytes else together

    return Measurements(
        read_bandwidth=one,
        read_bandwidth_all=together,
        piece_bandwidth=pieces,
        cached_bandwidth=tuple((size, cached(size)) for size in _WORKING_SETS),
        bf16_rate=bf16_per_cycle * gigahertz * 1e9,
        f32_rate=f32_per_cycle * gigahertz * 1e9,
        fork_join_seconds=_FORK_JOIN_SECONDS,
        threads=cores,
        origin=f"published for {source}, not measured",
    )


#: A typical server of each instruction set. Cores, clock, channels: data sheets; miss buffers and operations a
#: cycle: the vendors' optimization guides; memory latency: rounded from published measurements. Bytes a core reads in
#: a cycle: from its second-level cache by the guides, from the last level rounded from published measurements.
_PUBLISHED = {
    # 12 x DDR5-4800; one 512-bit multiply-add a cycle out of two halves, bf16 dot products at twice that.
    "avx512_bf16": _published("avx512_bf16", "AMD EPYC 9654 (Zen 4)", 96, 2.4, 460.8e9, 24, 110e-9, 32, 64, (32, 20)),
    # 8 x DDR4-3200; two 512-bit multiply-adds a cycle; 48 entries between L2 and the ring.
    "avx512": _published(
        "avx512", "Intel Xeon Platinum 8380 (Ice Lake)", 40, 2.3, 204.8e9, 48, 100e-9, 64, 64, (48, 10)
    ),
    # 8 x DDR4-3200; two 256-bit multiply-adds a cycle.
    "plain": _published("plain", "AMD EPYC 7763 (Zen 3, AVX2)", 64, 2.45, 204.8e9, 24, 100e-9, 32, 32, (32, 20)),
}


def _typical(isa: Isa, cores: int, extra: str) -> Target:
    """A named target."""
    features = tuple(sorted(ISA_FEATURES[isa] | set(extra.split())))
    model = _PUBLISHED[isa].origin.removeprefix("published for ").removesuffix(", not measured")
    return Target(f"cpu:{isa}", isa, "x86_64", model, features, cores, _TYPICAL_CACHES[isa])


_AVX2 = "avx avx2 fma f16c bmi1 bmi2 popcnt"
_NAMED = {
    "cpu:avx512_bf16": _typical("avx512_bf16", 96, _AVX2),
    "cpu:avx512": _typical("avx512", 40, _AVX2),
    "cpu:plain": _typical("plain", 64, _AVX2),
}
