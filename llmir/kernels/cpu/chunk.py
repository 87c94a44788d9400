"""Emits what one chunk of keys does to one tile of query rows: the inner loop of attention.

    scores        S = Q K^T                        in registers, then scratch
    soft cap      S = cap tanh(S / cap)            only with a soft cap
    mask          S = -inf past the row's limit    only where the chunk crosses one
    softmax       m, l, P                          online, in base 2 (Milakov and Gimelshein 2018)
    output        O = alpha O + P V

A row's state (m, l, O) is float32 in memory; queries and probabilities are stored as the products want them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.geometry import LOG2_E, Geometry
from llmir.kernels.cpu.products import STEP_BYTES

#: The running maximum before any key, and the score of a masked key: lower still, so that a row that has
#: seen only masked keys has weights of exactly zero and not 2**0.
NOTHING_SEEN = -1.0e30
MASKED = -2.0e30
_STEPS_PER_ITERATION = 8  # reduction steps unrolled in a product's inner loop
NEAR_CACHE = 2  # prefetch into the second-level cache: chunks are larger than the first
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class RowTile:
    """One tile of rows inside an item's scratch; limits never fall from one row to the next."""

    queries: ir.Value
    state: ir.Value
    limits: ir.Value
    rows: int

    def lowest_limit(self) -> ir.Value:
        """The first row's limit; a row sees the keys at positions below its limit."""
        return b.widen(b.load(self.limits, b.integer(32)))

    def highest_limit(self) -> ir.Value:
        """The last row's limit."""
        return b.widen(b.load(b.offset(self.limits, 4 * (self.rows - 1)), b.integer(32)))


class ChunkEmitter:
    """Emits the five steps; owns the scratch between them, which the constructor allocates in place."""

    def __init__(self, geometry: Geometry):
        self.geometry = g = geometry
        self.products = g.products
        self.signature = g.spec.signature
        self.variant = g.variant
        self.scores = b.stack_array(g.variant.row_tile * g.score_bytes)
        self.probabilities = b.stack_array(g.variant.row_tile * g.probability_bytes)
        self.alphas = b.stack_array(g.variant.row_tile * g.vector_bytes)

    def prefetch(self, keys: ir.Value) -> None:
        """Asks for the beginning of a chunk's keys and of its values."""
        for start in (keys, b.offset(keys, self.geometry.values_offset)):
            for line in range(self.variant.prefetch):
                b.prefetch(b.offset(start, line * CACHE_LINE), NEAR_CACHE)

    def attend(self, tile: RowTile, first_key: ir.Value, valid: ir.Value, keys: ir.Value) -> None:
        """One chunk against one tile of rows."""
        self._scores(tile, valid, keys)
        if self.signature.soft_cap:
            self._soft_cap()
        chunk_end = b.add(first_key, self.variant.key_chunk)
        crosses = b.less(b.minimum(tile.lowest_limit(), b.add(first_key, valid)), chunk_end)
        if self.signature.window:
            window_begin = b.sub(tile.highest_limit(), self.signature.window)
            crosses = b.either(crosses, b.less(first_key, window_begin))
        b.when(crosses, lambda: self._mask(tile, first_key, valid))
        self._softmax(tile)
        self._outputs(tile, valid, b.offset(keys, self.geometry.values_offset))

    # -- the steps of a chunk

    def _scores(self, tile: RowTile, valid: ir.Value, keys: ir.Value) -> None:
        """S = Q K^T for the chunk: ``row_tile`` x ``key_vectors`` accumulators at a time."""
        v, p = self.variant, self.products
        zero = b.constant(0.0, p.f32_vector())
        unroll = math.gcd(self.geometry.head_steps, _STEPS_PER_ITERATION)
        tile_keys = v.key_vectors * p.lanes

        def key_tile(number: ir.Value) -> None:
            base = b.offset(keys, b.mul(number, self._key_place(v.key_vectors, 0)))

            def steps(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = list(accumulators)
                at_keys = b.offset(base, b.mul(step, self.geometry.key_line_bytes))
                at_query = b.offset(tile.queries, b.mul(step, STEP_BYTES))
                for u in range(unroll):
                    loaded = [p.load_step(b.offset(at_keys, self._key_place(k, u))) for k in range(v.key_vectors)]
                    for r in range(v.row_tile):
                        query = p.load_broadcast(b.offset(at_query, r * self.geometry.query_bytes + u * STEP_BYTES))
                        for k in range(v.key_vectors):
                            i = r * v.key_vectors + k
                            sums[i] = p.dot(sums[i], query, loaded[k])
                return sums

            sums = b.loop(0, self.geometry.head_steps, unroll, steps, [zero] * (v.row_tile * v.key_vectors))
            target = b.offset(self.scores, b.mul(number, 4 * tile_keys))
            for i, value in enumerate(sums):
                r, k = divmod(i, v.key_vectors)
                b.store(value, b.offset(target, r * self.geometry.score_bytes + k * self.geometry.vector_bytes))

        b.loop(0, b.ceil_div(valid, tile_keys), 1, key_tile)

    def _key_place(self, vector: int, step: int) -> int:
        """Byte offset of one step of a vector of keys inside a chunk."""
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

    def _soft_cap(self) -> None:
        """S = cap tanh(scale S / cap), with tanh |x| = (1 - e) / (1 + e) of e = 2**(-2 |x| log2 e), in (0, 1]."""
        type_ = self.products.f32_vector()
        cap = self.signature.soft_cap
        inward = b.constant(2.0 * LOG2_E * self.signature.scale / cap, type_)
        one = b.constant(1.0, type_)

        def cap_scores(scores: ir.Value, _first: int) -> ir.Value:
            exponent = b.fmul(scores, inward)
            e = self.products.exp2(b.negate(b.magnitude(exponent)))
            tanh = b.fdiv(b.fsub(one, e), b.fadd(one, e))
            return b.fmul(b.constant(cap, type_), b.with_sign_of(tanh, exponent))

        b.loop(0, self.variant.row_tile, 1, lambda row: self._each_score(row, cap_scores))

    def _mask(self, tile: RowTile, first_key: ir.Value, valid: ir.Value) -> None:
        """S = MASKED for keys past the row's limit, past the item's range, or before the row's window."""
        p, s = self.products, self.signature
        type_ = p.f32_vector()
        i32_vector = b.vector_of(p.lanes, b.integer(32))
        lanes = b.add(b.lane_numbers(p.lanes), b.splat(b.narrow(first_key), p.lanes))
        end = b.narrow(b.add(first_key, valid))

        def mask_row(row: ir.Value) -> None:
            limit = b.load(b.offset(tile.limits, b.mul(row, 4)), b.integer(32))
            upper = b.splat(b.minimum(limit, end), p.lanes)
            lower = b.splat(b.sub(limit, s.window), p.lanes) if s.window else None

            def mask(scores: ir.Value, first: int) -> ir.Value:
                position = b.add(lanes, b.constant(first, i32_vector))
                seen = b.less(position, upper)
                if lower is not None:
                    seen = b.both(seen, b.at_least(position, lower))
                return b.select(seen, scores, b.constant(MASKED, type_))

            self._each_score(row, mask)

        b.loop(0, self.variant.row_tile, 1, mask_row)

    def _softmax(self, tile: RowTile) -> None:
        """m' = max(m, S); alpha = 2**(m - m'); P = 2**(S - m'); l' = alpha l + sum P."""
        p = self.products
        type_ = p.f32_vector()
        scale = b.constant(self.geometry.exponent_scale, type_)
        vectors = self.variant.key_chunk // p.lanes

        def row(number: ir.Value) -> None:
            line = b.offset(self.scores, b.mul(number, self.geometry.score_bytes))
            out = b.offset(self.probabilities, b.mul(number, self.geometry.probability_bytes))
            state = b.offset(tile.state, b.mul(number, self.geometry.state_bytes))
            scores = [b.load(b.offset(line, k * self.geometry.vector_bytes), type_) for k in range(vectors)]
            largest = scores[0]
            for value in scores[1:]:
                largest = b.fmax(largest, value)
            before = b.load(state, type_)
            now = b.fmax(before, b.splat(b.widest(largest), p.lanes))
            alpha = p.exp2(b.fmul(b.fsub(before, now), scale))
            shift = b.negate(b.fmul(now, scale))
            total = b.fmul(b.load(b.offset(state, self.geometry.vector_bytes), type_), alpha)
            for k, value in enumerate(scores):
                probability = p.exp2(b.fma(value, scale, shift))
                total = b.fadd(total, probability)
                place = k * p.lanes // p.elements_per_step * STEP_BYTES
                p.store_scratch(probability, b.offset(out, place))
            b.store(now, state)
            b.store(total, b.offset(state, self.geometry.vector_bytes))
            b.store(alpha, b.offset(self.alphas, b.mul(number, self.geometry.vector_bytes)))

        b.loop(0, self.variant.row_tile, 1, row)

    def _outputs(self, tile: RowTile, valid: ir.Value, values: ir.Value) -> None:
        """O = alpha O + P V, ``value_vectors`` of the head at a time."""
        for first in range(0, self.geometry.head_vectors, self.variant.value_vectors):
            count = min(self.variant.value_vectors, self.geometry.head_vectors - first)
            self._output_columns(tile, valid, values, range(first, first + count))

    def _output_columns(self, tile: RowTile, valid: ir.Value, values: ir.Value, columns: range) -> None:
        v, p = self.variant, self.products
        type_ = p.f32_vector()
        line_bytes = self.geometry.value_line_bytes
        whole_steps = b.div(valid, p.elements_per_step)
        unroll = math.gcd(v.key_chunk // p.elements_per_step, _STEPS_PER_ITERATION)
        unrolled_end = b.mul(b.div(whole_steps, unroll), unroll)

        def places_of(r: int) -> list[ir.Value]:
            output = b.offset(tile.state, r * self.geometry.state_bytes + 2 * self.geometry.vector_bytes)
            return [b.offset(output, c * self.geometry.vector_bytes) for c in columns]

        def step_of(sums: list[ir.Value], step_values: list[ir.Value], probabilities: ir.Value) -> None:
            for r in range(v.row_tile):
                probability = p.load_broadcast(b.offset(probabilities, r * self.geometry.probability_bytes))
                for c, value in enumerate(step_values):
                    i = r * len(columns) + c
                    sums[i] = p.dot(sums[i], probability, value)

        def steps(count: int):
            def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = list(accumulators)
                at_values = b.offset(values, b.mul(step, line_bytes))
                at_probability = b.offset(self.probabilities, b.mul(step, STEP_BYTES))
                for u in range(count):
                    places = [u * line_bytes + c * p.step_vector_bytes for c in columns]
                    loaded = [p.load_step(b.offset(at_values, place)) for place in places]
                    step_of(sums, loaded, b.offset(at_probability, u * STEP_BYTES))
                return sums

            return body

        sums: list[ir.Value] = []
        for r in range(v.row_tile):
            alpha = b.load(b.offset(self.alphas, r * self.geometry.vector_bytes), type_)
            sums += [b.fmul(b.load(place, type_), alpha) for place in places_of(r)]
        sums = b.loop(0, unrolled_end, unroll, steps(unroll), sums)
        sums = b.loop(unrolled_end, whole_steps, 1, steps(1), sums)
        if p.elements_per_step > 1:
            half_step = self._half_step(values, columns, step_of)
            sums = b.loop(whole_steps, b.ceil_div(valid, p.elements_per_step), 1, half_step, sums)
        for r in range(v.row_tile):
            for c, place in enumerate(places_of(r)):
                b.store(sums[r * len(columns) + c], place)

    def _half_step(self, values: ir.Value, columns: range, step_of):
        """The last step of an odd range: its second value may never have been written."""
        p = self.products
        line_bytes = self.geometry.value_line_bytes

        def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
            sums = list(accumulators)
            at_values = b.offset(values, b.mul(step, line_bytes))
            loaded = [p.load_half_step(b.offset(at_values, c * p.step_vector_bytes)) for c in columns]
            step_of(sums, loaded, b.offset(self.probabilities, b.mul(step, STEP_BYTES)))
            return sums

        return body
