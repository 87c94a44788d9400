"""Emits the second product of attention, O = alpha O + P V: what a chunk's values add to a tile's outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.geometry import STEPS_PER_ITERATION, Geometry
from llmir.kernels.cpu.place import ChunkPlace, ask_ahead
from llmir.kernels.cpu.products import Operand, in_chains, joined
from llmir.kernels.cpu.rows import RowTile

#: Adds a piece of values to sums: (the piece's number, how many of its values, sums) to sums.
PieceStep: TypeAlias = Callable[[ir.Value | int, ir.Value | int, list[ir.Value]], list[ir.Value]]


class OutputEmitter:
    """Emits it from where the softmax leaves a chunk's ``probabilities`` and the rows' ``alphas``."""

    def __init__(self, geometry: Geometry, probabilities: ir.Value, alphas: ir.Value):
        self.geometry = geometry
        self.products = geometry.products
        self.variant = geometry.variant
        self.probabilities, self.alphas = probabilities, alphas

    def add_values(self, tile: RowTile, valid: ir.Value, place: ChunkPlace) -> None:
        """O = alpha O + P V, ``value_vectors`` of the head at a time.

        Each part of the head goes through all of the chunk's values, with its sums in registers. Where memory is what
        counts, all parts go through a piece before the next one: reading stays forward, and what was asked for is near.
        """
        parts = self.geometry.output_parts
        if self.geometry.reads_once and len(parts) > 1:
            for columns in parts:
                self._store_sums(tile, columns, self._scaled_sums(tile, columns))

            def all_parts(piece: ir.Value | int, keys: ir.Value | int, _: list[ir.Value]) -> list[ir.Value]:
                for columns in parts:
                    sums = [b.load(at, self.products.f32_vector()) for at in self._places_of_sums(tile, columns)]
                    self._store_sums(tile, columns, self._add_piece(piece, keys, sums, place=place, columns=columns))
                return []

            self._walk_pieces(place, valid, all_parts, [])
            return
        for columns in parts:
            part = partial(self._add_piece, place=place, columns=columns)
            self._store_sums(tile, columns, self._walk_pieces(place, valid, part, self._scaled_sums(tile, columns)))

    def _places_of_sums(self, tile: RowTile, columns: range) -> list[ir.Value]:
        """Addresses of some vectors of every row's O."""
        g = self.geometry
        return [
            b.offset(tile.state, row * g.state_bytes + (2 + c) * g.vector_bytes)
            for row in range(self.variant.row_tile)
            for c in columns
        ]

    def _scaled_sums(self, tile: RowTile, columns: range) -> list[ir.Value]:
        """alpha O."""
        type_ = self.products.f32_vector()
        alphas = [
            b.load(b.offset(self.alphas, row * self.geometry.vector_bytes), type_)
            for row in range(self.variant.row_tile)
        ]
        places = self._places_of_sums(tile, columns)
        return [f.fmul(b.load(at, type_), alphas[i // len(columns)]) for i, at in enumerate(places)]

    def _store_sums(self, tile: RowTile, columns: range, sums: list[ir.Value]) -> None:
        for value, at in zip(sums, self._places_of_sums(tile, columns), strict=True):
            b.store(value, at)

    def _walk_pieces(self, place: ChunkPlace, valid: ir.Value, add: PieceStep, sums: list[ir.Value]) -> list[ir.Value]:
        """``sums`` after ``add(piece, keys, sums)`` of each piece: the whole ones first, then the keys of the last."""
        g = self.geometry
        if g.chunk_pieces == 1:
            return add(0, valid, sums)
        whole = b.div(valid, g.piece_keys)  # more than the pieces before the window, or no row saw the chunk
        rest = b.rem(valid, g.piece_keys)
        sums = b.loop(place.first_piece, whole, 1, lambda piece, *s: add(piece, g.piece_keys, list(s)), sums)
        return b.loop(whole, b.ceil_div(valid, g.piece_keys), 1, lambda piece, *s: add(piece, rest, list(s)), sums)

    def _add_piece(
        self, piece: ir.Value | int, keys: ir.Value | int, sums: list[ir.Value], *, place: ChunkPlace, columns: range
    ) -> list[ir.Value]:
        """``sums`` with P V of the first ``keys`` values of one of the chunk's pieces."""
        g = self.geometry
        pieces = place.values(piece), place.values(b.add(piece, g.pieces_together))
        at = b.mul(piece, self.products.scratch_bytes(g.piece_keys))
        return self._add_values(sums, pieces, b.offset(self.probabilities, at), keys, columns)

    def _add_values(
        self,
        sums: list[ir.Value],
        pieces: tuple[ir.Value, ir.Value],
        probabilities: ir.Value,
        keys: ir.Value | int,
        columns: range,
    ) -> list[ir.Value]:
        """``sums`` with P V of ``keys`` values of a piece (the first; the second comes after it).

        A number of keys that is known here is one of whole steps.
        """
        v, p, g = self.variant, self.products, self.geometry
        piece_steps = g.piece_keys // p.elements_per_step
        unroll = math.gcd(piece_steps, STEPS_PER_ITERATION)
        if piece_steps == 2 * unroll:
            unroll //= 2  # LLVM unrolls a loop of two rounds too, and then runs out of registers: prefill took 1.2x

        chains = g.chains(len(columns))
        sums = [*sums, *[b.constant(0.0, p.f32_vector())] * ((chains - 1) * len(sums))]

        def step_of(sums: list[ir.Value], step_values: list[Operand], at: ir.Value) -> None:
            p.add_products(sums, [b.offset(at, r * g.probability_bytes) for r in range(v.row_tile)], step_values)

        part_bytes = len(columns) * p.step_vector_bytes
        parts = [g.value_part(c) for c in columns]
        here_piece, next_piece = pieces
        next_part = b.offset(next_piece, columns.start * p.step_vector_bytes * piece_steps)

        def places(step: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            here = b.offset(here_piece, b.mul(step, g.value_line_bytes))
            ahead = b.offset(next_part, b.mul(step, part_bytes))
            return here, ahead, b.offset(probabilities, b.mul(step, p.step_scratch_bytes))

        def steps(count: int):
            def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                added = in_chains(accumulators, chains)
                here, ahead, at_probability = places(step)
                for u in range(count):
                    ask_ahead(g, ahead, u * part_bytes, part_bytes)
                    at = u * g.value_line_bytes
                    loaded = [
                        p.load_step(b.offset(here, at + c * p.step_vector_bytes), part)
                        for c, part in zip(columns, parts, strict=True)
                    ]
                    step_of(added[u % chains], loaded, b.offset(at_probability, u * p.step_scratch_bytes))
                return [value for chain in added for value in chain]

            return body

        def half_step(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
            """The last step of an odd range: its second value may never have been written."""
            added = in_chains(accumulators, chains)
            here, _, at_probability = places(step)
            loaded = [
                p.load_half_step(b.offset(here, c * p.step_vector_bytes), part)
                for c, part in zip(columns, parts, strict=True)
            ]
            step_of(added[0], loaded, at_probability)
            return [value for chain in added for value in chain]

        if isinstance(keys, int):
            return joined(b.loop(0, piece_steps, unroll, steps(unroll), sums), chains)
        whole_steps = b.div(keys, p.elements_per_step)
        unrolled_end = b.mul(b.div(whole_steps, unroll), unroll)
        sums = b.loop(0, unrolled_end, unroll, steps(unroll), sums)
        sums = b.loop(unrolled_end, whole_steps, 1, steps(1), sums)
        if p.elements_per_step > 1:
            sums = b.loop(whole_steps, b.ceil_div(keys, p.elements_per_step), 1, half_step, sums)
        return joined(sums, chains)
