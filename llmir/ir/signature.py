"""What a compiled attention kernel is made for, as plain records.

The same facts stand in the IR as types and attributes; these records carry them to where no MLIR is
loaded: a plan on disk, a serving process, the key of a compiled object.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmir.ir.instruction_sets import lanes_of

ElementType = Literal["bf16", "f16", "f32"]
#: "logical" is the framework's page before a layout is decided: [block, KV head, slot, key then value].
CacheLayout = Literal["logical", "row", "lane", "pair"]
#: Instruction sets of CPUs (instruction_sets.py), "none" for a CPU without kernels, then GPU architectures by their
#: compilers' names.
Isa = Literal["avx512_bf16", "avx512", "avx2", "none", "sm_80", "sm_90", "sm_100", "gfx942"]

ELEMENT_BYTES: dict[str, int] = {"bf16": 2, "f16": 2, "f32": 4}
#: Element type of a cache that keeps keys and values divided by a scale, and bytes of an element.
QUANTIZED_TYPE = "f8E4M3FN"
QUANTIZED_BYTES = 1
GPUS: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_SIZES = (64, 80, 96, 128, 256)


def is_gpu(isa: str) -> bool:
    """Whether ``isa`` is a GPU architecture."""
    return isa in GPUS


def packed_layout(element_type: str) -> CacheLayout:
    """The layout that products read: of bfloat16 pairs, which a shift and a mask widen where there is no dot product of
    them; of other types one key a lane."""
    return "pair" if element_type == "bf16" else "lane"


def padded(size: int) -> int:
    """The next power of two, as the extents of a GPU's tiles are."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class AttentionSignature:
    """One attention layer's shape on one rank: layers with equal signatures share a kernel.

    A page is one (block, KV head): ``2 * block_size * head_size`` elements, keys first, then values. With
    groups of N keys (see :meth:`key_group`), the layouts inside a page are as follows; "row" has blocks of any
    size, the others whole groups.

    =====  ===============================================  ==================================
    row    K ``[block_size][head_size]``                    V ``[block_size][head_size]``
    lane   K ``[block_size / N][head_size][N]``             V ``[block_size][head_size]``
    pair   K ``[block_size / N][head_size / 2][N][2]``      V ``[block_size / 2][head_size][2]``
    =====  ===============================================  ==================================
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    element_type: ElementType
    """Of queries, of new keys and values, of the output; and of the cache, where it is not quantized."""
    block_size: int
    """Tokens in a block."""
    scale: float
    """Factor on query-key products."""
    window: int = 0
    """Tokens a query may attend to, itself included; 0: all."""
    soft_cap: float = 0.0
    """Scores become ``soft_cap * tanh(score / soft_cap)``; 0: they stay."""
    layout: CacheLayout = "logical"
    quantized: bool = False
    """The cache is of QUANTIZED_TYPE: keys and values are divided by a scale of the layer's keys, and one of its
    values, before they are rounded to it."""
    sinks: bool = False
    """Every query head has a score of its own that takes part in the softmax and has no value (gpt-oss)."""

    @property
    def cache_type(self) -> str:
        """Element type of the KV cache."""
        return QUANTIZED_TYPE if self.quantized else self.element_type

    @property
    def queries_per_kv(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def key_group(self, isa: Isa) -> int:
        """Keys whose elements lie side by side: two vectors of them, or one where two do not divide a block.

        Two, because a kernel that takes a group at a time then reads memory strictly forward, which is what
        hardware prefetchers follow, and still has enough sums in flight. Of a "row" cache, groups are formed in
        the kernel's own memory, so two vectors always fit.
        """
        one = lanes_of(isa)
        return 2 * one if self.layout == "row" or self.block_size % (2 * one) == 0 else one

    @property
    def key_bytes(self) -> int:
        """Bytes of one key and its value in one KV head."""
        element_bytes = QUANTIZED_BYTES if self.quantized else ELEMENT_BYTES[self.element_type]
        return 2 * self.head_size * element_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return self.num_kv_heads * self.key_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one block of one KV head, keys and values."""
        return self.block_size * self.key_bytes


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


def variant_of(record: dict[str, Any]) -> CpuVariant | GpuVariant:
    """The variant that a dictionary of its fields holds; TypeError where it holds none."""
    return GpuVariant(**record) if "warps" in record else CpuVariant(**record)


def variants_of(records: Iterable[dict[str, Any]]) -> Variants:
    """The variants of one kernel from their dictionaries; TypeError where these are not all of one kind."""
    variants = tuple(map(variant_of, records))
    if len({type(variant) for variant in variants}) > 1:
        raise TypeError("variants of a CPU and of a GPU in one kernel")
    return variants  # type: ignore[return-value]


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

    signature: AttentionSignature
    isa: Isa
    variants: Variants

    @property
    def symbol(self) -> str:
        """Name of the kernel function, readable: ``attention_9x3x64_bf16_block128``."""
        s = self.signature
        extras = (f"_window{s.window}" if s.window else "") + ("_softcap" if s.soft_cap else "")
        extras += ("_sinks" if s.sinks else "") + ("_fp8" if s.quantized else "")
        return f"attention_{s.num_heads}x{s.num_kv_heads}x{s.head_size}_{s.element_type}_block{s.block_size}{extras}"

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
    def from_json(cls, data: dict[str, Any]) -> KernelSpec:
        """The inverse of :meth:`to_json`; raises KeyError or TypeError on other data."""
        return cls(
            signature=AttentionSignature(**data["signature"]),
            isa=data["isa"],
            variants=variants_of(data["variants"]),
        )
