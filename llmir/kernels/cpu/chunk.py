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
from llmir.kernels.cpu.place import ChunkPlace
from llmir.kernels.cpu.products import Operand

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

    def attend(self, tile: RowTile, first_key: ir.Value, valid: ir.Value, place: ChunkPlace) -> None:
        """One chunk against one tile of rows."""
        self._scores(tile, valid, place)
        if self.signature.soft_cap:
            self._soft_cap()
        chunk_end = b.add(first_key, self.variant.key_chunk)
        crosses = b.less(b.minimum(tile.lowest_limit(), b.add(first_key, valid)), chunk_end)
        if self.signature.window:
            window_begin = b.sub(tile.highest_limit(), self.signature.window)
            crosses = b.either(crosses, b.less(first_key, window_begin))
        b.when(crosses, lambda: self._mask(tile, first_key, valid))
        self._softmax(tile)
        self._outputs(tile, valid, place)

    # -- the steps of a chunk

    def _scores(self, tile: RowTile, valid: ir.Value, place: ChunkPlace) -> None:
        """S = Q K^T for the chunk: ``row_tile`` x ``key_vectors`` accumulators at a time."""
        v, p = self.variant, self.products
        zero = b.constant(0.0, p.f32_vector())
        unroll = math.gcd(self.geometry.head_steps, _STEPS_PER_ITERATION)
        tile_keys = v.key_vectors * p.lanes

        def key_tile(number: ir.Value) -> None:
            pieces = self._tile_pieces(place, number)
            piece_vectors = v.key_vectors // len(pieces)

            def steps(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = list(accumulators)
                inside = b.mul(step, self.geometry.key_line_bytes)
                at_pieces = [(b.offset(here, inside), b.offset(ahead, inside)) for here, ahead in pieces]
                at_query = b.offset(tile.queries, b.mul(step, p.step_scratch_bytes))
                asked: list[set[int]] = [set() for _ in at_pieces]
                for u in range(unroll):
                    loaded = [
                        self._load(here, ahead, self._key_place(k, u), lines)
                        for (here, ahead), lines in zip(at_pieces, asked, strict=True)
                        for k in range(piece_vectors)
                    ]
                    at_step = b.offset(at_query, u * p.step_scratch_bytes)
                    rows = [b.offset(at_step, r * self.geometry.query_bytes) for r in range(v.row_tile)]
                    p.add_products(sums, rows, loaded)
                return sums

            sums = b.loop(0, self.geometry.head_steps, unroll, steps, [zero] * (v.row_tile * v.key_vectors))
            target = b.offset(self.scores, b.mul(number, 4 * tile_keys))
            for i, value in enumerate(sums):
                r, k = divmod(i, v.key_vectors)
                b.store(value, b.offset(target, r * self.geometry.score_bytes + k * self.geometry.vector_bytes))

        b.loop(0, b.ceil_div(valid, tile_keys), 1, key_tile)

    def _tile_pieces(self, place: ChunkPlace, number: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
        """Addresses of the keys of a chunk's tile ``number``, one for each page it covers, and of what comes after."""
        g = self.geometry
        tile_keys = self.variant.key_vectors * self.products.lanes
        if tile_keys > g.page_keys:
            count = g.pages_together
            pages = [b.add(b.mul(number, count), i) for i in range(count)]
            return [(place.keys(page), place.keys(b.add(page, count))) for page in pages]
        tiles = g.page_keys // tile_keys
        page, number_inside = b.div(number, tiles), b.rem(number, tiles)
        inside = b.mul(number_inside, self._key_place(self.variant.key_vectors, 0))
        return [(b.offset(place.keys(page), inside), b.offset(place.keys(b.add(page, 1)), inside))]

    def _load(self, here: ir.Value, ahead: ir.Value, at: int, asked: set[int]) -> Operand:
        """One step of keys or values; asks for the same place of the next piece.

        ``asked``: the cache lines that were asked for so: a line holds up to four vectors.
        """
        if self.geometry.reads_ahead and at // CACHE_LINE not in asked:
            asked.add(at // CACHE_LINE)
            b.prefetch(b.offset(ahead, at), NEAR_CACHE)
        return self.products.load_step(b.offset(here, at))

    def _key_place(self, vector: int, step: int) -> int:
        """Byte offset of one step of a vector of keys inside a page."""
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
                place = p.scratch_bytes(k * p.lanes)
                p.store_scratch(probability, b.offset(out, place))
            b.store(now, state)
            b.store(total, b.offset(state, self.geometry.vector_bytes))
            b.store(alpha, b.offset(self.alphas, b.mul(number, self.geometry.vector_bytes)))

        b.loop(0, self.variant.row_tile, 1, row)

    def _outputs(self, tile: RowTile, valid: ir.Value, place: ChunkPlace) -> None:
        """O = alpha O + P V, ``value_vectors`` of the head at a time."""
        for first in range(0, self.geometry.head_vectors, self.variant.value_vectors):
            count = min(self.variant.value_vectors, self.geometry.head_vectors - first)
            self._output_columns(tile, valid, place, range(first, first + count))

    def _output_columns(self, tile: RowTile, valid: ir.Value, place: ChunkPlace, columns: range) -> None:
        """Some columns of O: whole pages first, then the keys of the last one."""
        g, v = self.geometry, self.variant
        type_ = self.products.f32_vector()

        def places_of(r: int) -> list[ir.Value]:
            output = b.offset(tile.state, r * g.state_bytes + 2 * g.vector_bytes)
            return [b.offset(output, c * g.vector_bytes) for c in columns]

        sums: list[ir.Value] = []
        for r in range(v.row_tile):
            alpha = b.load(b.offset(self.alphas, r * g.vector_bytes), type_)
            sums += [b.fmul(b.load(at, type_), alpha) for at in places_of(r)]
        sums = self._add_pages(sums, place, valid, columns)
        for r in range(v.row_tile):
            for c, at in enumerate(places_of(r)):
                b.store(sums[r * len(columns) + c], at)

    def _add_pages(self, sums: list[ir.Value], place: ChunkPlace, valid: ir.Value, columns: range) -> list[ir.Value]:
        """``sums`` with the chunk's values."""
        g = self.geometry
        page_bytes = self.products.scratch_bytes(g.page_keys)

        def page(keys: ir.Value | int):
            def body(number: ir.Value | int, *accumulators: ir.Value) -> list[ir.Value]:
                pieces = place.values(number), place.values(b.add(number, g.pages_together))
                probabilities = b.offset(self.probabilities, b.mul(number, page_bytes))
                return self._add_values(list(accumulators), pieces, probabilities, keys, columns)

            return body

        if g.chunk_pages == 1:
            return page(valid)(0, *sums)
        whole_pages = b.div(valid, g.page_keys)  # more than the pages before the window, or no row saw the chunk
        sums = b.loop(place.first_page, whole_pages, 1, page(g.page_keys), sums)
        return b.loop(whole_pages, b.ceil_div(valid, g.page_keys), 1, page(b.rem(valid, g.page_keys)), sums)

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
        page_steps = g.page_keys // p.elements_per_step
        unroll = math.gcd(page_steps, _STEPS_PER_ITERATION)
        if page_steps == 2 * unroll:
            unroll //= 2  # LLVM unrolls a loop of two rounds too, and then runs out of registers: prefill took 1.2x

        def step_of(sums: list[ir.Value], step_values: list[Operand], at: ir.Value) -> None:
            p.add_products(sums, [b.offset(at, r * g.probability_bytes) for r in range(v.row_tile)], step_values)

        def places(step: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
            inside = b.mul(step, g.value_line_bytes)
            here, ahead = (b.offset(piece, inside) for piece in pieces)
            return here, ahead, b.offset(probabilities, b.mul(step, p.step_scratch_bytes))

        def steps(count: int):
            def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                added = list(accumulators)
                here, ahead, at_probability = places(step)
                asked: set[int] = set()
                for u in range(count):
                    at = u * g.value_line_bytes
                    loaded = [self._load(here, ahead, at + c * p.step_vector_bytes, asked) for c in columns]
                    step_of(added, loaded, b.offset(at_probability, u * p.step_scratch_bytes))
                return added

            return body

        def half_step(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
            """The last step of an odd range: its second value may never have been written."""
            added = list(accumulators)
            here, _, at_probability = places(step)
            step_of(added, [p.load_half_step(b.offset(here, c * p.step_vector_bytes)) for c in columns], at_probability)
            return added

        if isinstance(keys, int):
            return b.loop(0, page_steps, unroll, steps(unroll), sums)
        whole_steps = b.div(keys, p.elements_per_step)
        unrolled_end = b.mul(b.div(whole_steps, unroll), unroll)
        sums = b.loop(0, unrolled_end, unroll, steps(unroll), sums)
        sums = b.loop(unrolled_end, whole_steps, 1, steps(1), sums)
        if p.elements_per_step > 1:
            sums = b.loop(whole_steps, b.ceil_div(keys, p.elements_per_step), 1, half_step, sums)
        return sums
