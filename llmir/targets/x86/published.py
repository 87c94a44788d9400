"""Figures of a typical server of each instruction set, from data sheets: nothing of it was measured by llmir."""

from __future__ import annotations

from llmir.targets.records import Cache, Hardware, Measurements
from llmir.targets.x86.isa import INSTRUCTION_SETS

#: As the system calls it.
ARCHITECTURE = "x86_64"

#: Cost of starting a piece at a random place: a DRAM access after a page walk that misses too.
_ACCESSES_PER_PIECE = 2
#: Piece sizes the published bandwidths are worked out for, the range a page of a KV cache takes.
_PIECES = (4 << 10, 16 << 10, 64 << 10, 256 << 10)
#: Working sets the published bandwidths are worked out for.
_WORKING_SETS = tuple((128 << 10) << i for i in range(10))
#: OpenMP fork-join of a socket, the order of EPCC's OpenMP micro-benchmarks; calibration replaces it.
_FORK_JOIN_SECONDS = 10e-6
_CACHE_LINE = 64
_TYPICAL_CACHES: dict[str, tuple[Cache, ...]] = {
    "avx512_bf16": (Cache(1, 32 << 10, 1), Cache(2, 1 << 20, 1), Cache(3, 32 << 20, 8)),
    "avx512": (Cache(1, 48 << 10, 1), Cache(2, 1280 << 10, 1), Cache(3, 60 << 20, 40)),
    "avx2": (Cache(1, 32 << 10, 1), Cache(2, 512 << 10, 1), Cache(3, 32 << 20, 8)),
}


def _published(
    isa: str,
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
PUBLISHED: dict[str, Measurements] = {
    # 12 x DDR5-4800; one 512-bit multiply-add a cycle out of two halves, bf16 dot products at twice that.
    "avx512_bf16": _published("avx512_bf16", "AMD EPYC 9654 (Zen 4)", 96, 2.4, 460.8e9, 24, 110e-9, 32, 64, (32, 20)),
    # 8 x DDR4-3200; two 512-bit multiply-adds a cycle; 48 entries between L2 and the ring.
    "avx512": _published(
        "avx512", "Intel Xeon Platinum 8380 (Ice Lake)", 40, 2.3, 204.8e9, 48, 100e-9, 64, 64, (48, 10)
    ),
    # 8 x DDR4-3200; two 256-bit multiply-adds a cycle.
    "avx2": _published("avx2", "AMD EPYC 7763 (Zen 3, AVX2)", 64, 2.45, 204.8e9, 24, 100e-9, 32, 32, (32, 20)),
}


def _typical(isa: str) -> Hardware:
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


TYPICAL: dict[str, Hardware] = {isa: _typical(isa) for isa in PUBLISHED}
