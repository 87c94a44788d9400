"""A GPU architecture: a chip's data sheet, which nothing here was measured on, and the tiles that fit it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from llmir.targets.records import Cache, Hardware, Measurements

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
#: Fewest rows of a tensor core's product.
LEAST_ROWS = 16


class Tile(NamedTuple):
    """Sizes of a tile, and who works on it."""

    rows: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Multiprocessor:
    """What a streaming multiprocessor (NVIDIA) or a compute unit (AMD) has for thread blocks, besides shared memory."""

    warps: int
    """Of each of its schedulers."""
    registers: int
    """32-bit registers of each of its schedulers, for all threads."""
    register_unit: int
    """A warp's registers are whole multiples of this."""
    blocks: int
    reserved_bytes: int = 0
    """Shared memory that the driver keeps for itself in each thread block."""
    tensor_columns: int = 0
    """Columns of tensor memory; 0: it has none."""


@dataclass(frozen=True)
class Chip:
    """A data sheet. Bandwidths in bytes a second, rates in floating-point operations a second, of the whole chip."""

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
    multiprocessor: Multiprocessor
    quantizes: bool = False
    """Whether Triton compiles 8-bit numbers of QUANTIZED_DTYPE for it."""
    queries_in_registers: bool = False
    """Whether Triton keeps a tile's queries in registers alone."""
    prefill: Mapping[int, Tile] = field(default_factory=dict)
    """By padded head size, where the usual tile (see tiles.py) spills registers or takes more shared memory than there
    is."""
    decode: Mapping[int, Tile] = field(default_factory=dict)
    """The same of decode."""

    def hardware(self, isa: str, machine: str) -> Hardware:
        caches = (
            Cache(level, size, self.units // instances) for level, (size, instances, _) in enumerate(self.caches, 2)
        )
        block, unit = self.shared_memory
        return Hardware(isa, machine, self.model, (), self.units, (Cache(1, unit, 1), *caches), block)

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
