"""GPUs: published figures of the chips that kernels are made for. None of them has been measured by llmir."""

from __future__ import annotations

from dataclasses import dataclass

from llmir.ir.kernel_spec import Isa
from llmir.target.records import Cache, Hardware, Measurements

#: Bytes on their way to an SM or CU: two tiles of 64 keys and values at head size 128, as decode asks for them.
_BYTES_IN_FLIGHT = 64 << 10
#: A piece of memory is found by its entry in the block table: that access, and then the piece's own.
_ACCESSES_PER_PIECE = 2
#: What memory is asked for at a time; smaller pieces waste the rest of it. 64 bytes are two sectors of 32.
_LEAST_ACCESS = 64
#: Piece sizes the published bandwidths are worked out for, the range a page of a KV cache takes.
_PIECES = (64, 1 << 10, 16 << 10, 256 << 10)
#: From L2 to an SM or CU in a cycle: NVIDIA A100 whitepaper; AMD CDNA 3 whitepaper.
_BYTES_PER_CYCLE = 64
#: Launching a kernel: the order of what "Getting Started with CUDA Graphs" (NVIDIA, 2019) shows.
_LAUNCH_SECONDS = 2e-6


@dataclass(frozen=True)
class _Chip:
    """A data sheet. Bandwidths in bytes a second, rates in floating-point operations a second, of the whole chip."""

    name: str
    machine: str
    model: str
    units: int
    """SMs or CUs."""
    gigahertz: float
    bandwidth: float
    latency: float
    """Seconds of an access to memory on an idle chip."""
    bf16_rate: float
    """Dense matrix products."""
    f32_rate: float
    """Multiply-adds of vectors."""
    shared_memory: tuple[int, int]
    """Bytes of shared memory that one thread block may use, and that an SM or CU has."""
    caches: tuple[tuple[int, int, float], ...]
    """(bytes of one instance, instances, bandwidth of all of them) from the second level on."""

    def hardware(self, isa: Isa) -> Hardware:
        caches = (
            Cache(level, size, self.units // instances) for level, (size, instances, _) in enumerate(self.caches, 2)
        )
        block, unit = self.shared_memory
        return Hardware(isa, self.machine, self.model, (), self.units, (Cache(1, unit, 1), *caches), block)

    def figures(self) -> Measurements:
        """Pieces: an SM or CU keeps _BYTES_IN_FLIGHT on their way, however many pieces they are in (Little's law)."""
        kept = self.units * _BYTES_IN_FLIGHT / (_ACCESSES_PER_PIECE * self.latency)
        pieces = tuple((size, min(self.bandwidth, kept * min(1.0, size / _LEAST_ACCESS))) for size in _PIECES)
        # Twice what the last level holds is read from memory.
        cached = [(size, rate) for size, _, rate in self.caches] + [(2 * self.caches[-1][0], self.bandwidth)]
        return Measurements(
            read_bandwidth=_BYTES_PER_CYCLE * self.gigahertz * 1e9,
            read_bandwidth_all=self.bandwidth,
            piece_bandwidth=pieces,
            cached_bandwidth=tuple(cached),
            bf16_rate=self.bf16_rate / self.units,
            f32_rate=self.f32_rate / self.units,
            fork_join_seconds=_LAUNCH_SECONDS,
            threads=self.units,
            origin=f"published for {self.model}, not measured",
            latency_seconds=self.latency,
        )


#: Shared memory: tables of compute capabilities in the CUDA C++ Programming Guide; L2 bandwidth of A100: 5120 bytes a
#: cycle (NVIDIA A100 whitepaper). Memory latency: cycles of a pointer chase (Luo et al., "Benchmarking and Dissecting
#: the Nvidia Hopper GPU Architecture", arXiv 2402.13499) at the boost clock.
_CHIPS: dict[Isa, _Chip] = {
    # NVIDIA A100 80 GB data sheet and whitepaper.
    "sm_80": _Chip(
        name="cuda:sm_80",
        machine="cuda",
        model="NVIDIA A100 SXM 80 GB",
        units=108,
        gigahertz=1.41,
        bandwidth=2039e9,
        latency=466 / 1.41e9,
        bf16_rate=312e12,
        f32_rate=19.5e12,
        shared_memory=(163 << 10, 164 << 10),
        caches=((40 << 20, 1, 5120 * 1.41e9),),
    ),
    # NVIDIA H100 data sheet and whitepaper; L2 as wide as A100's (as in PMC10448217, table 3).
    "sm_90": _Chip(
        name="cuda:sm_90",
        machine="cuda",
        model="NVIDIA H100 SXM",
        units=132,
        gigahertz=1.83,
        bandwidth=3350e9,
        latency=479 / 1.755e9,
        bf16_rate=989.4e12,
        f32_rate=66.9e12,
        shared_memory=(227 << 10, 228 << 10),
        caches=((50 << 20, 1, 5120 * 1.755e9),),
    ),
    # NVIDIA HGX B200 data sheet, an eighth of it; SMs, clock and L2 size: "Nvidia's B200: Keeping the CUDA Juggernaut
    # Rolling" (Chips and Cheese, 2025). Nothing is published of its L2 bandwidth and memory latency: taken as H100's,
    # the former once for each of its two dies.
    "sm_100": _Chip(
        name="cuda:sm_100",
        machine="cuda",
        model="NVIDIA B200",
        units=148,
        gigahertz=1.85,
        bandwidth=8000e9,
        latency=479 / 1.755e9,
        bf16_rate=2250e12,
        f32_rate=75e12,
        shared_memory=(227 << 10, 228 << 10),
        caches=((126 << 20, 1, 2 * 5120 * 1.85e9),),
    ),
    # AMD Instinct MI300X data sheet; caches: AMD CDNA 3 whitepaper, an L2 of 2048 bytes a cycle for each of 8 dies and
    # the Infinity Cache. Memory latency: rounded from published pointer chases.
    "gfx942": _Chip(
        name="hip:gfx942",
        machine="hip",
        model="AMD Instinct MI300X",
        units=304,
        gigahertz=2.1,
        bandwidth=5300e9,
        latency=400e-9,
        bf16_rate=1307.4e12,
        f32_rate=163.4e12,
        shared_memory=(64 << 10, 64 << 10),
        caches=((4 << 20, 8, 8 * 2048 * 2.1e9), (256 << 20, 1, 17.2e12)),
    ),
}

PUBLISHED: dict[Isa, Measurements] = {isa: chip.figures() for isa, chip in _CHIPS.items()}
#: By the name of the target.
NAMED: dict[str, Hardware] = {chip.name: chip.hardware(isa) for isa, chip in _CHIPS.items()}
