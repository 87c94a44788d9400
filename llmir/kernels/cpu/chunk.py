"""Emits what one chunk of keys does to one tile of query rows: the inner loop of attention.

    scores        S = Q K^T                        in registers, then scratch; exponents of two
    stages        S = cap tanh(S / cap), ...       score_stages.py, only those that there are
    mask          S = -inf past the row's limit    only where the chunk crosses one
    softmax       m, l, P                          online, in base 2 (Milakov and Gimelshein 2018)
    output        O = alpha O + P V                outputs.py

A row's state (m, l, O) is float32 in memory; queries and probabilities are stored as the products want them.

Scores are scaled before their maximum is taken off: the difference is then exact where it matters. Scaling with it, in
one multiply-add, leaves what rounding the scaled maximum lost, which from scores of 2**30 on is more than a float32 can
be an exponent of.
"""

from __future__ import annotations

import math
from functools import partial

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.geometry import STEPS_PER_ITERATION, Geometry
from llmir.kernels.cpu.outputs import OutputEmitter
from llmir.kernels.cpu.place import ChunkPlace, ask_ahead
from llmir.kernels.cpu.products import in_chains, joined
from llmir.kernels.cpu.rows import RowTile
from llmir.kernels.cpu.score_stages import stage_emitters, through

#: The running maximum before any key: the least finite float32, so that the weight of a score of -inf is 0 whatever
#: else a row has seen, and a row that has seen no other has weights that sum to 0, and outputs of 0 / 0.
NOTHING_SEEN = -(2.0 - 2.0**-23) * 2.0**127
MASKED = -math.inf


class ChunkEmitter:
    """Emits the five steps; owns the scratch between them, which the constructor allocates in place."""

    def __init__(self, geometry: Geometry):
        self.geometry = g = geometry
        self.products = g.products
        self.attention = g.spec.attention
        self.variant = g.variant
        self.scores = b.stack_array(g.variant.row_tile * g.score_bytes)
        self.probabilities = b.stack_array(g.variant.row_tile * g.probability_bytes)
        self.alphas = b.stack_array(g.variant.row_tile * g.vector_bytes)
        self.stages, self.late_stages = stage_emitters(g)
        self.outputs = OutputEmitter(g, self.probabilities, self.alphas)

    def attend(self, tile: RowTile, first_key: ir.Value, valid: ir.Value, place: ChunkPlace) -> None:
        """One chunk against one tile of rows."""
        self._scores(tile, valid, place)
        if self.stages:
            self._score_stages(tile, first_key)
        chunk_end = b.add(first_key, self.variant.key_chunk)
        crosses = b.less(b.minimum(tile.lowest_limit(), b.add(first_key, valid)), chunk_end)
        if self.attention.mask.window:
            window_begin = b.sub(tile.highest_limit(), self.attention.mask.width)
            crosses = b.either(crosses, b.less(first_key, window_begin))
        b.when(crosses, lambda: self._mask(tile, first_key, valid))
        self._softmax(tile, first_key)
        self.outputs.add_values(tile, valid, place)

    # -- the steps of a chunk

    def _scores(self, tile: RowTile, valid: ir.Value, place: ChunkPlace) -> None:
        """S = Q K^T for the chunk: ``row_tile`` x ``key_vectors`` accumulators at a time."""
        v, p = self.variant, self.products
        zero = b.constant(0.0, p.f32_vector())
        unroll = math.gcd(self.geometry.head_steps, STEPS_PER_ITERATION)
        chains = self.geometry.chains(v.key_vectors)
        tile_keys = self.geometry.tile_keys

        def key_tile(number: ir.Value) -> None:
            pieces = self._tile_pieces(place, number)
            piece_vectors = v.key_vectors // len(pieces)

            def steps(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = in_chains(accumulators, chains)
                inside = b.mul(step, self.geometry.key_line_bytes)
                at_pieces = [(b.offset(here, inside), b.offset(ahead, inside)) for here, ahead in pieces]
                at_query = b.offset(tile.queries, b.mul(step, p.step_scratch_bytes))
                for u in range(unroll):
                    loaded = []
                    for here, ahead in at_pieces:
                        for k in range(piece_vectors):
                            place = self._key_place(k, u)
                            ask_ahead(self.geometry, ahead, place, p.step_vector_bytes)
                            loaded.append(p.load_step(b.offset(here, place)))
                    at_step = b.offset(at_query, u * p.step_scratch_bytes)
                    rows = [b.offset(at_step, r * self.geometry.query_bytes) for r in range(v.row_tile)]
                    p.add_products(sums[u % len(sums)], rows, loaded)
                return [value for chain in sums for value in chain]

            carried = [zero] * (chains * v.row_tile * v.key_vectors)
            sums = joined(b.loop(0, self.geometry.head_steps, unroll, steps, carried), chains)
            target = b.offset(self.scores, b.mul(number, 4 * tile_keys))
            for i, value in enumerate(sums):
                r, k = divmod(i, v.key_vectors)
                place_of_sum = b.offset(target, r * self.geometry.score_bytes + k * self.geometry.vector_bytes)
                b.store(p.scaled(value, self.geometry.exponent_scale), place_of_sum)

        b.loop(0, b.ceil_div(valid, tile_keys), 1, key_tile)

    def _tile_pieces(self, place: ChunkPlace, number: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Addresses of the keys of a chunk's tile ``number``, one for each piece it covers, and of what comes after."""
        g = self.geometry
        if g.tile_keys > g.piece_keys:
            count = g.pieces_together
            pieces = [b.add(b.mul(number, count), i) for i in range(count)]
            return [(place.keys(piece), place.keys(b.add(piece, count))) for piece in pieces]
        tiles = g.piece_keys // g.tile_keys
        piece, number_inside = b.div(number, tiles), b.rem(number, tiles)
        inside = b.mul(number_inside, self._key_place(self.variant.key_vectors, 0))
        return [(b.offset(place.keys(piece), inside), b.offset(place.keys(b.add(piece, 1)), inside))]

    def _key_place(self, vector: int, step: int) -> int:
        """Byte offset of one step of a vector of keys inside a piece."""
        g = self.geometry
        group, inside = divmod(vector, g.group_vectors)
        return group * g.key_group_bytes + step * g.key_line_bytes + inside * self.products.step_vector_bytes

    def _each_score(self, row: int | ir.Value, change) -> None:
        """``S[row] = change(S[row], first key of the vector)``, vector by vector."""
        p = self.products
        line = b.offset(self.scores, b.mul(row, self.geometry.score_bytes))
        for k in range(self.variant.key_chunk // p.lanes):
            place = b.offset(line, k * self.geometry.vector_bytes)
            b.store(change(b.load(place, p.f32_vector()), k * p.lanes), place)

    def _score_stages(self, tile: RowTile, first_key: ir.Value) -> None:
        """S = stages(S), all stages of a vector at once."""

        def row(number: ir.Value) -> None:
            changes = [stage(tile, number, first_key) for stage in self.stages]
            self._each_score(number, partial(through, changes))

        b.loop(0, self.variant.row_tile, 1, row)

    def _mask(self, tile: RowTile, first_key: ir.Value, valid: ir.Value) -> None:
        """S = MASKED for keys past the row's limit, past the item's range, or before the row's window."""
        p, s = self.products, self.attention
        type_ = p.f32_vector()
        i32_vector = b.vector_of(p.lanes, b.integer(32))
        lanes = b.add(b.lane_numbers(p.lanes), f.splat(b.narrow(first_key), p.lanes))
        end = b.narrow(b.add(first_key, valid))

        def mask_row(row: ir.Value) -> None:
            limit = b.load(b.offset(tile.limits, b.mul(row, 4)), b.integer(32))
            upper = f.splat(b.minimum(limit, end), p.lanes)
            lower = f.splat(b.sub(limit, s.mask.width), p.lanes) if s.mask.window else None

            def mask(scores: ir.Value, first: int) -> ir.Value:
                position = b.add(lanes, b.constant(first, i32_vector))
                seen = b.less(position, upper)
                if lower is not None:
                    seen = b.both(seen, b.at_least(position, lower))
                return b.select(seen, scores, b.constant(MASKED, type_))

            self._each_score(row, mask)

        b.loop(0, self.variant.row_tile, 1, mask_row)

    def _softmax(self, tile: RowTile, first_key: ir.Value) -> None:
        """S = late stages(S); m' = max(m, S); alpha = 2**(m - m'); P = 2**(S - m'); l' = alpha l + sum P."""
        p = self.products
        type_ = p.f32_vector()
        vectors = self.variant.key_chunk // p.lanes

        def row(number: ir.Value) -> None:
            line = b.offset(self.scores, b.mul(number, self.geometry.score_bytes))
            out = b.offset(self.probabilities, b.mul(number, self.geometry.probability_bytes))
            state = b.offset(tile.state, b.mul(number, self.geometry.state_bytes))
            scores = [b.load(b.offset(line, k * self.geometry.vector_bytes), type_) for k in range(vectors)]
            changes = [stage(tile, number, first_key) for stage in self.late_stages]
            scores = [through(changes, value, k * p.lanes) for k, value in enumerate(scores)]
            largest = scores[0]
            for value in scores[1:]:
                largest = f.fmax(largest, value)
            before = b.load(state, type_)
            now = f.fmax(before, f.widest(largest, p.lanes))
            alpha = p.exp2(f.fsub(before, now))
            total = f.fmul(b.load(b.offset(state, self.geometry.vector_bytes), type_), alpha)
            for k, value in enumerate(scores):
                probability = p.exp2(f.fsub(value, now))
                total = f.fadd(total, probability)
                place = p.scratch_bytes(k * p.lanes)
                p.store_scratch(probability, b.offset(out, place))
            b.store(now, state)
            b.store(total, b.offset(state, self.geometry.vector_bytes))
            b.store(alpha, b.offset(self.alphas, b.mul(number, self.geometry.vector_bytes)))

        b.loop(0, self.variant.row_tile, 1, row)
