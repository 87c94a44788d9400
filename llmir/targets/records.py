"""What a target is described by: what it is made of, and the figures that passes weigh their choices by.

On a GPU a thread is a streaming multiprocessor (SM) or compute unit (CU) with all the thread blocks it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmir.errors import LlmirError

#: Instruction set of a processor that there are no kernels for.
WITHOUT_KERNELS = "none"


class TargetError(LlmirError):
    """A target's name is not known, or a target is not the machine that was asked to compile for it."""


@dataclass(frozen=True)
class Cache:
    """One level of data cache; level 1 of a GPU is the shared memory of an SM or CU."""

    level: int
    bytes: int
    """Size of one instance."""
    shared_by: int
    """Logical CPUs, SMs or CUs that share an instance."""


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of."""

    isa: str
    """Instruction set of a CPU, or architecture of a GPU."""
    machine: str
    """Processor architecture as the kernel calls it, such as ``x86_64``; of a GPU ``cuda`` or ``hip``."""
    model: str
    """Processor model, for a reader."""
    features: tuple[str, ...]
    """Instructions that the processor has, sorted: they decide its instruction set; a GPU's are those of its
    architecture."""
    cores: int
    """Physical cores this process may run on; SMs or CUs of a GPU."""
    caches: tuple[Cache, ...]
    """Data caches, ascending level."""
    shared_memory: int = 0
    """Bytes of shared memory that one thread block of a GPU may use."""

    def cache_bytes(self, level: int) -> int:
        """Bytes of one cache of ``level``, 0 where the machine has none or does not tell."""
        return next((cache.bytes for cache in self.caches if cache.level == level), 0)


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
    """Starting ``threads`` threads on an empty task and waiting for them; on a GPU, launching an empty kernel."""
    threads: int
    origin: str
    """Where the figures come from, for a reader."""
    latency_seconds: float = 0.0
    """One access to memory that waits for the one before; 0 on CPUs, where ``piece_bandwidth`` holds it."""
    error: float = 0.0
    """Part by which bandwidths may be too low: so far their two best measurements lay apart at most."""

    def __post_init__(self) -> None:
        figures = [self.read_bandwidth, self.read_bandwidth_all, self.bf16_rate, self.f32_rate]
        for name in ("piece_bandwidth", "cached_bandwidth"):
            sizes = [size for size, _ in getattr(self, name)]
            if not sizes or sizes != sorted(set(sizes)) or min(sizes) <= 0:
                raise TargetError(f"{name} needs ascending sizes in bytes, not {sizes}")
            figures += [rate for _, rate in getattr(self, name)]
        if min(figures) <= 0 or min(self.fork_join_seconds, self.latency_seconds, self.error) < 0:
            raise TargetError(f"the figures of a target must be positive ({self.origin}); calibrate it again")

    def piece_rate(self, piece_bytes: int) -> float:
        """Bandwidth in bytes a second of all threads that read pieces of ``piece_bytes`` in random order.

        Between two measured sizes the time per piece is linear in its size (a fixed cost to find a piece, then
        a stream); below the smallest, that fixed cost stays; above the largest, its bandwidth does. No piece is
        faster than a stream: where one was measured to be, something slowed the stream.
        """
        return min(self.found_piece_rate(piece_bytes), self.read_bandwidth_all)

    def found_piece_rate(self, piece_bytes: int) -> float:
        """:meth:`piece_rate` as if memory gave all threads what each of them could read."""
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
