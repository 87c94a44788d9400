"""Sizes and strides that the parts of one attention variant share, in bytes where they say so."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmir.ir.kernel_spec import CpuVariant, KernelSpec
from llmir.kernels.cpu import abi
from llmir.kernels.cpu.products import Part, Products
from llmir.targets.x86.isa import SUMS_IN_FLIGHT

LOG2_E = math.log2(math.e)
STEPS_PER_ITERATION = 8  # reduction steps unrolled in a product's inner loop


@dataclass(frozen=True)
class VectorParts:
    """So many elements that lie side by side, taken a vector at a time: the last one may be no whole one."""

    elements: int
    lanes: int

    @property
    def count(self) -> int:
        """Vectors."""
        return -(-self.elements // self.lanes)

    def filled(self, number: int) -> int:
        """Elements in vector ``number``."""
        return min(self.lanes, self.elements - number * self.lanes)


@dataclass(frozen=True)
class Geometry:
    """One variant of one kernel, measured out."""

    spec: KernelSpec
    variant: CpuVariant

    @property
    def products(self) -> Products:
        """The arithmetic of the kernel's element type and instruction set."""
        return Products.of(self.spec)

    @property
    def padded_rows(self) -> int:
        """Rows of a full item in whole row tiles."""
        return abi.padded_rows(self.spec, self.variant)

    @property
    def state_bytes(self) -> int:
        """A row's running maximum, sum and output."""
        return abi.state_bytes(self.spec)

    @property
    def vector_bytes(self) -> int:
        """A vector of float32."""
        return 4 * self.products.lanes

    @property
    def head_steps(self) -> int:
        """Reduction steps of a query-key product."""
        return self.spec.attention.head_size // self.products.elements_per_step

    @property
    def key_parts(self) -> VectorParts:
        """A query, or a key, in vectors."""
        return VectorParts(self.spec.attention.head_size, self.products.lanes)

    @property
    def value_parts(self) -> VectorParts:
        """A row's output, or a value, in vectors."""
        return VectorParts(self.spec.attention.value_size, self.products.lanes)

    def value_part(self, number: int) -> Part:
        """Vector ``number`` of one step's values."""
        alignment = math.gcd(self.value_line_bytes, self.products.step_vector_bytes)
        return Part(self.value_parts.filled(number), alignment)

    @property
    def query_bytes(self) -> int:
        """A query row in scratch, in whole vectors."""
        return self.products.scratch_bytes(self.key_parts.count * self.products.lanes)

    @property
    def score_bytes(self) -> int:
        """A row's scores of one chunk."""
        return 4 * self.variant.key_chunk

    @property
    def probability_bytes(self) -> int:
        """A row's probabilities of one chunk."""
        return self.products.scratch_bytes(self.variant.key_chunk)

    @property
    def group_vectors(self) -> int:
        """Vectors in a key group."""
        return self.spec.attention.cache.key_group(self.products.lanes) // self.products.lanes

    @property
    def key_line_bytes(self) -> int:
        """One step's keys of a key group."""
        return self.group_vectors * self.products.step_vector_bytes

    @property
    def key_group_bytes(self) -> int:
        """A key group, all its elements."""
        return self.head_steps * self.key_line_bytes

    @property
    def value_line_bytes(self) -> int:
        """One step's values, all their elements."""
        return self.spec.attention.cache.value_bytes * self.products.elements_per_step

    @property
    def tile_keys(self) -> int:
        """Keys whose scores a row keeps in registers."""
        return self.variant.key_vectors * self.products.lanes

    @property
    def piece_keys(self) -> int:
        """Keys of a piece: what of a chunk lies in one page, or where memory is asked for, a part of it.

        The most whole tiles that divide the page and are at most ``prefetch`` keys.
        """
        s, v = self.spec.attention, self.variant
        page = v.key_chunk if s.cache.layout == "row" else min(v.key_chunk, s.cache.block_size)
        if not self.reads_ahead or self.tile_keys >= page:
            return page
        tiles = range(self.tile_keys, max(v.prefetch, self.tile_keys) + 1, self.tile_keys)
        return max(keys for keys in tiles if page % keys == 0)

    @property
    def chunk_pieces(self) -> int:
        """Pieces of a chunk's keys; its values are as many."""
        return self.variant.key_chunk // self.piece_keys

    @property
    def pieces_together(self) -> int:
        """Pieces whose keys are multiplied at a time: those that a tile of ``key_vectors`` spans."""
        return max(1, self.tile_keys // self.piece_keys)

    @property
    def output_parts(self) -> list[range]:
        """The vectors of a row's output, as many together as stay in registers."""
        most, vectors = self.variant.value_vectors, self.value_parts.count
        return [range(first, min(first + most, vectors)) for first in range(0, vectors, most)]

    def chains(self, vectors: int) -> int:
        """Sums for each result of ``row_tile`` x ``vectors``, added in turn: as many as keep the multipliers busy."""
        results = self.variant.row_tile * vectors
        fitting = self.products.instructions.accumulators // results
        return max(1, min(fitting, -(-SUMS_IN_FLIGHT // results)))

    @property
    def reads_once(self) -> bool:
        """Whether one tile of rows is all that a chunk meets: memory is then what its order of reading is for."""
        return self.padded_rows == self.variant.row_tile

    @property
    def reads_ahead(self) -> bool:
        """Whether reading a piece asks for the next one; a "row" cache does so while it gathers."""
        return self.variant.prefetch > 0 and self.spec.attention.cache.layout != "row"

    @property
    def values_offset(self) -> int:
        """From a chunk's keys to its values, in a page or, of a "row" cache, gathered from many."""
        s = self.spec.attention
        return self.variant.key_chunk * s.cache.key_bytes if s.cache.layout == "row" else s.cache.values_offset

    @property
    def exponent_scale(self) -> float:
        """Turns a product of query and key into an exponent of two: the softmax's, or of a soft cap the one in tanh."""
        s = self.spec.attention
        return s.scale * LOG2_E * (2.0 / s.soft_cap if s.soft_cap else 1.0)
