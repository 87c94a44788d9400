"""What a compiled attention kernel is made of, and how a step is cut for it, as plain records.

These stand in the IR as attributes too; records carry them to where no MLIR is loaded: a plan on disk, a serving
process, the key of a compiled object.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmir.ir import records
from llmir.ir.attention_spec import AttentionSpec


def padded(size: int) -> int:
    """The next power of two, as the extents of a GPU's tiles are."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class KernelVariant:
    """Tile sizes of one variant of the attention kernel.

    A variant handles an item of up to ``max_tokens`` query tokens (times the query heads of a KV head =
    rows), ``row_tile`` rows at a time, softmax once every ``key_chunk`` keys.
    """

    name: Literal["decode", "prefill"]
    max_tokens: int
    row_tile: int
    key_chunk: int
    """Keys between two softmax steps: whole blocks, or a part that divides one; in layout "row" any number."""


@dataclass(frozen=True)
class CpuVariant(KernelVariant):
    """A variant on a CPU: what of a tile of rows stays in vector registers."""

    key_vectors: int
    """Vectors of scores a query row keeps in registers; whole key groups."""
    value_vectors: int
    """Vectors of output a query row keeps in registers."""
    prefetch: int
    """Keys ahead that memory is asked for; 0: not at all. Keys and values are read in pieces of about as many keys, and
    while one is read, the same place of the piece that comes next is asked for, wherever it lies. In layout "row": keys
    ahead whose rows are asked for."""


@dataclass(frozen=True)
class GpuVariant(KernelVariant):
    """A variant on a GPU: one thread block an item, whose rows are one tile of ``row_tile`` rows, padded."""

    warps: int
    """Warps (of 32 or 64 threads) of a thread block."""
    stages: int
    """Tiles of keys in shared memory: one that is worked on, the others on their way. 1: none is asked for ahead."""


Variants = tuple[CpuVariant, ...] | tuple[GpuVariant, ...]


@dataclass(frozen=True)
class SharingCosts:
    """What it costs one thread to read a part of one KV head's cache: by each request, or once for all of them.

    Times in nanoseconds. ``runtime/sharing.py`` says how they are weighed.
    """

    most_rows: int
    """Requests with more query rows in a step (new tokens times queries_per_kv) read their cache alone: their own
    rows share the reading already."""
    least_tokens: int
    """Shorter parts are never shared."""
    read_key: float
    """One key and its value, from memory."""
    cached_key: tuple[tuple[int, float], ...]
    """(tokens of the part, time): the same where another request has just read the part, which is then in a cache as
    far as it fits; ascending."""
    tile_key: float
    """One tile of rows of the prefill variant against one key."""
    decode_rows: int
    """Rows of a request up to which the decode variant serves it."""
    decode_row_key: float
    """One row of the decode variant, whose tiles are smaller, against one key."""
    row: float
    """Leaving the state of one row, and merging it."""
    margin: float
    """A part is shared where that costs at most this part of reading it by each request."""


@dataclass(frozen=True)
class StepPolicy:
    """The run-time conditions by which a step's work list is cut."""

    decode_tokens: int
    """A request with at most this many new tokens uses the decode variant."""
    split_keys: int
    """Least keys in one split of a request's KV cache."""
    items_per_thread: int
    """An item that is more than one part in so many of a thread's work is split; on a GPU, of its work in a launch."""
    sharing: SharingCosts | None = None
    """When a part of the cache is read once for several requests; None: never."""


@dataclass(frozen=True)
class KernelSpec:
    """Everything that decides the code of one kernel function."""

    attention: AttentionSpec
    isa: str
    """Instruction set of a CPU, or architecture of a GPU; see targets/registry.py."""
    variants: Variants

    @property
    def symbol(self) -> str:
        """Name of the kernel function, readable: ``attention_9x3x64_bf16_block128``."""
        s = self.attention
        extras = "" if s.mask.causal else "_bidirectional"
        extras += (f"_window{s.mask.window}" if s.mask.window else "") + "".join(
            f"_{one.tag}" for one in s.score_stages
        )
        extras += ("_sinks" if s.sinks else "") + ("_fp8" if s.cache.quantized else "")
        head = f"{s.head_size}" if s.value_size == s.head_size else f"{s.head_size}v{s.value_size}"
        return f"attention_{s.num_heads}x{s.num_kv_heads}x{head}_{s.dtype}_block{s.cache.block_size}{extras}"

    @property
    def cpu_variants(self) -> tuple[CpuVariant, ...]:
        """The variants of a kernel for a CPU; none of one for a GPU."""
        return tuple(variant for variant in self.variants if isinstance(variant, CpuVariant))

    @property
    def gpu_variants(self) -> tuple[GpuVariant, ...]:
        """The variants of a kernel for a GPU; none of one for a CPU."""
        return tuple(variant for variant in self.variants if isinstance(variant, GpuVariant))

    def variant(self, name: str) -> CpuVariant | GpuVariant:
        """The variant called ``name``; KeyError if this kernel has none."""
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> KernelSpec:
        """The inverse of :meth:`to_json`; RecordError, a TypeError, on other data."""
        spec: KernelSpec = records.read(cls, data, "spec")
        return spec
