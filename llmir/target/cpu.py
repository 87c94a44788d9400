"""CPUs: instruction sets, this machine as ``/proc`` and ``/sys`` show it, and published figures of typical servers."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from llmir.ir.instruction_sets import INSTRUCTION_SETS
from llmir.ir.kernel_spec import Isa
from llmir.target.records import Cache, Hardware, Measurements

#: What kernels of a CPU are compiled for, as the system calls it.
ARCHITECTURE = "x86_64"
#: Instruction set of a processor that there are no kernels for.
WITHOUT_KERNELS: Isa = "none"

#: Flags of a processor with Intel's matrix unit, which no kernel uses.
AMX_FEATURES = frozenset({"amx_tile", "amx_bf16"})

#: CPU flags that tell one processor from another: instructions. The others are of virtualization, power, workarounds.
_CODE_FEATURES = re.compile(
    r"(s?sse\d?(_[12])?|pni|ssse3|sse4a|avx.*|amx.*|fma4?|f16c|bmi[12]|abm|lzcnt|popcnt|movbe|adx|aes|vaes|"
    r"pclmulqdq|vpclmulqdq|gfni|sha_ni|cx16|rdrand|rdseed|rdpid|clflushopt|clwb|prfchw|3dnowprefetch|xop|tbm|"
    r"xsave.*|fsgsbase|movdiri|movdir64b|serialize|asimd.*|sve.*|bf16|i8mm|fp|fphp)"
)


def detect(root: Path = Path("/")) -> Hardware:
    """This machine's CPU, read from ``/proc`` and ``/sys`` below ``root``."""
    model, flags = _cpuinfo(root)
    cpus = sorted(os.sched_getaffinity(0))
    return Hardware(
        isa=_best(platform.machine(), flags),
        machine=platform.machine(),
        model=model,
        features=tuple(sorted(flag for flag in flags if _CODE_FEATURES.fullmatch(flag))),
        cores=_cores(root, cpus),
        caches=_caches(root, cpus[0]),
    )


def _best(machine: str, flags: frozenset[str]) -> Isa:
    """The best instruction set of a processor with these flags."""
    found = (name for name, instructions in INSTRUCTION_SETS.items() if instructions.features <= flags)
    best = next(found, WITHOUT_KERNELS) if machine == ARCHITECTURE else WITHOUT_KERNELS
    return best  # type: ignore[return-value]


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
        return path.read_text(encoding="utf-8", errors="replace").strip()
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
    "avx2": (Cache(1, 32 << 10, 1), Cache(2, 512 << 10, 1), Cache(3, 32 << 20, 8)),
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
PUBLISHED: dict[Isa, Measurements] = {
    # 12 x DDR5-4800; one 512-bit multiply-add a cycle out of two halves, bf16 dot products at twice that.
    "avx512_bf16": _published("avx512_bf16", "AMD EPYC 9654 (Zen 4)", 96, 2.4, 460.8e9, 24, 110e-9, 32, 64, (32, 20)),
    # 8 x DDR4-3200; two 512-bit multiply-adds a cycle; 48 entries between L2 and the ring.
    "avx512": _published(
        "avx512", "Intel Xeon Platinum 8380 (Ice Lake)", 40, 2.3, 204.8e9, 48, 100e-9, 64, 64, (48, 10)
    ),
    # 8 x DDR4-3200; two 256-bit multiply-adds a cycle.
    "avx2": _published("avx2", "AMD EPYC 7763 (Zen 3, AVX2)", 64, 2.45, 204.8e9, 24, 100e-9, 32, 32, (32, 20)),
}


def _typical(isa: Isa) -> Hardware:
    """The server that the published figures are of."""
    figures = PUBLISHED[isa]
    return Hardware(
        isa=isa,
        machine=ARCHITECTURE,
        model=figures.origin.removeprefix("published for ").removesuffix(", not measured"),
        features=tuple(sorted(INSTRUCTION_SETS[isa].features)),
        cores=figures.threads,
        caches=_TYPICAL_CACHES[isa],
    )


#: By the name of the target.
NAMED: dict[str, Hardware] = {f"cpu:{isa}": _typical(isa) for isa in PUBLISHED}
