"""Emits paged attention: one work item, in one variant's tile sizes, and the merge of split items.

An item is a tile of query rows (tokens x the query heads of one KV head) against a range of one KV head's
cache. Keys come in chunks; per chunk and per ``row_tile`` rows:

    scores        S = Q K^T            registers, then scratch
    soft cap      S = cap tanh(S / cap)            only with a soft cap
    mask          S = -inf past the row's limit    only where the chunk crosses one
    softmax       m, l, P = online softmax in base 2 (Milakov and Gimelshein 2018)
    output        O = alpha O + P V

A row's state (m, l, O) stays in float32 in scratch, or directly in its partial slot when the item is a split.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmir.ir.bindings import ir
from llmir.ir.signature import AttentionSignature, KernelSpec, KernelVariant
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.abi import ARGUMENT_OFFSET, Item, padded_rows, partial_bytes, state_bytes
from llmir.kernels.cpu.products import STEP_BYTES, Products

LOG2_E = math.log2(math.e)
#: The running maximum before any key, and the score of a masked key: lower still, so that a row that has
#: seen only masked keys has weights of exactly zero and not 2**0.
NOTHING_SEEN = -1.0e30
MASKED = -2.0e30
_STEPS_PER_ITERATION = 8  # reduction steps unrolled in a product's inner loop
_NEAR_CACHE = 2  # prefetch into the second-level cache: chunks are larger than the first


def argument(arguments: ir.Value, name: str, type_: ir.Type | None = None) -> ir.Value:
    """A field of the argument record; an address unless ``type_`` says otherwise."""
    return b.load(b.offset(arguments, ARGUMENT_OFFSET[name]), type_ or b.pointer())


def count_argument(arguments: ir.Value, name: str) -> ir.Value:
    """An i64 field of the argument record."""
    return argument(arguments, name, b.integer(64))


def item_field(item: ir.Value, field: Item) -> ir.Value:
    """A column of a work item, as i64."""
    return b.widen(b.load(b.offset(item, 4 * field), b.integer(32)))


@dataclass(frozen=True)
class RowTile:
    """One tile of rows inside an item's scratch."""

    first_row: ir.Value
    queries: ir.Value
    state: ir.Value
    limits: ir.Value


class AttentionEmitter:
    """Emits one variant of the attention of one signature."""

    def __init__(self, spec: KernelSpec, variant: KernelVariant):
        self.products = Products.of(spec)
        self.signature: AttentionSignature = spec.signature
        self.variant = variant
        s, p = self.signature, self.products
        self.padded_rows = padded_rows(spec, variant)
        self.partial_bytes = partial_bytes(spec)
        self.head_steps = s.head_size // p.elements_per_step
        self.head_vectors = s.head_size // p.lanes
        self.query_bytes = self.head_steps * STEP_BYTES
        self.state_bytes = state_bytes(spec)
        self.score_bytes = 4 * variant.key_chunk
        self.probability_bytes = variant.key_chunk // p.elements_per_step * STEP_BYTES
        self.vector_bytes = 4 * p.lanes
        self.value_offset = s.page_bytes // 2
        #: Multiplies a score into an exponent of two.
        self.exponent_scale = LOG2_E if s.soft_cap else s.scale * LOG2_E

    # -- the item

    def emit_item(self, arguments: ir.Value, item: ir.Value) -> None:
        """The whole item: load queries, walk the chunks, write the output or leave a partial state."""
        s = self.signature
        tokens = item_field(item, Item.TOKENS)
        rows = b.mul(tokens, s.queries_per_kv)
        partial = item_field(item, Item.PARTIAL)
        whole = b.less(partial, 0)
        own_state = b.stack_array(self.padded_rows * self.state_bytes)
        slot = b.offset(argument(arguments, "partials"), b.mul(partial, self.partial_bytes))
        self.item, self.arguments = item, arguments
        self.state = b.select(whole, own_state, slot)
        self.queries = b.stack_array(self.padded_rows * self.query_bytes)
        self.limits = b.stack_array(self.padded_rows * 4)
        self.scores = b.stack_array(self.variant.row_tile * self.score_bytes)
        self.probabilities = b.stack_array(self.variant.row_tile * self.probability_bytes)
        self.alphas = b.stack_array(self.variant.row_tile * self.vector_bytes)
        self.tiles = b.ceil_div(rows, self.variant.row_tile)
        self._load_queries(tokens)
        self._clear_state()
        self._walk_chunks()
        b.choose(whole, lambda: self._finish(tokens, self.state), lambda: self._count_split(tokens))

    def _first_query(self, name: str) -> ir.Value:
        """Address of the item's first row in ``query`` or ``output``."""
        s = self.signature
        stride = count_argument(self.arguments, f"{name}_stride")
        token = b.mul(item_field(self.item, Item.TOKEN), stride)
        head = b.mul(item_field(self.item, Item.KV_HEAD), s.queries_per_kv * s.head_size)
        return b.offset(argument(self.arguments, name), b.mul(b.add(token, head), self.products.element_bytes))

    def _load_queries(self, tokens: ir.Value) -> None:
        """Queries and key limits of all rows into scratch; padding repeats the last row, so limits never fall."""
        s, p = self.signature, self.products
        source = self._first_query("query")
        token_bytes = b.mul(count_argument(self.arguments, "query_stride"), p.element_bytes)
        position = item_field(self.item, Item.POSITION)
        rows = b.mul(tokens, s.queries_per_kv)
        head_bytes = s.head_size * p.element_bytes

        def copy_row(row: ir.Value) -> None:
            inside = b.minimum(row, b.sub(rows, 1))
            token, head = b.div(inside, s.queries_per_kv), b.rem(inside, s.queries_per_kv)
            address = b.offset(source, b.add(b.mul(token, token_bytes), b.mul(head, head_bytes)))
            target = b.offset(self.queries, b.mul(row, self.query_bytes))
            for v in range(self.head_vectors):
                scratch = v * p.lanes // p.elements_per_step * STEP_BYTES
                p.copy_query(b.offset(address, v * p.lanes * p.element_bytes), b.offset(target, scratch))
            limit = b.narrow(b.add(b.add(position, token), 1))
            b.store(limit, b.offset(self.limits, b.mul(row, 4)))

        b.loop(0, b.mul(self.tiles, self.variant.row_tile), 1, copy_row)

    def _clear_state(self) -> None:
        type_ = self.products.f32_vector()

        def clear_row(row: ir.Value) -> None:
            state = b.offset(self.state, b.mul(row, self.state_bytes))
            b.store(b.constant(NOTHING_SEEN, type_), state)
            for v in range(1, 2 + self.head_vectors):
                b.store(b.constant(0.0, type_), b.offset(state, v * self.vector_bytes))

        b.loop(0, b.mul(self.tiles, self.variant.row_tile), 1, clear_row)

    # -- chunks

    def _walk_chunks(self) -> None:
        v, s = self.variant, self.signature
        begin, end = item_field(self.item, Item.KEY_BEGIN), item_field(self.item, Item.KEY_END)
        last_chunk = b.mul(b.div(b.sub(end, 1), v.key_chunk), v.key_chunk)

        def chunk(first_key: ir.Value) -> None:
            keys = self._chunk_address(first_key)
            ahead = self._chunk_address(b.minimum(b.add(first_key, v.prefetch * v.key_chunk), last_chunk))
            valid = b.minimum(b.sub(end, first_key), v.key_chunk)

            def tile(number: ir.Value) -> None:
                first_row = b.mul(number, v.row_tile)
                rows = RowTile(
                    first_row,
                    b.offset(self.queries, b.mul(first_row, self.query_bytes)),
                    b.offset(self.state, b.mul(first_row, self.state_bytes)),
                    b.offset(self.limits, b.mul(first_row, 4)),
                )
                sees_chunk = b.less(first_key, self._highest_limit(rows))
                if s.window:
                    window_begin = b.sub(self._lowest_limit(rows), s.window)
                    sees_chunk = b.both(sees_chunk, b.less(window_begin, b.add(first_key, v.key_chunk)))
                b.when(sees_chunk, lambda: self._attend(rows, first_key, valid, keys, ahead))

            b.loop(0, self.tiles, 1, tile)

        b.loop(begin, end, v.key_chunk, chunk)

    def _lowest_limit(self, tile: RowTile) -> ir.Value:
        """The first row's limit; a row sees the keys at positions below its limit."""
        return b.widen(b.load(tile.limits, b.integer(32)))

    def _highest_limit(self, tile: RowTile) -> ir.Value:
        """The last row's limit."""
        return b.widen(b.load(b.offset(tile.limits, 4 * (self.variant.row_tile - 1)), b.integer(32)))

    def _chunk_address(self, first_key: ir.Value) -> ir.Value:
        """Address of a chunk's keys, found through the block table; its values lie ``value_offset`` after."""
        s, p = self.signature, self.products
        stride = count_argument(self.arguments, "block_table_stride")
        row = b.mul(item_field(self.item, Item.REQUEST), stride)
        entry = b.offset(
            argument(self.arguments, "block_table"), b.mul(b.add(row, b.div(first_key, s.block_size)), 4)
        )
        block = b.widen(b.load(entry, b.integer(32)))
        page = b.add(b.mul(block, s.num_kv_heads), item_field(self.item, Item.KV_HEAD))
        inside = b.mul(b.rem(first_key, s.block_size), s.head_size * p.element_bytes)
        return b.offset(argument(self.arguments, "cache"), b.add(b.mul(page, s.page_bytes), inside))

    def _attend(self, tile: RowTile, first_key: ir.Value, valid: ir.Value, keys: ir.Value, ahead: ir.Value) -> None:
        """One chunk against one tile of rows."""
        self._scores(tile, valid, keys, ahead)
        if self.signature.soft_cap:
            self._soft_cap()
        chunk_end = b.add(first_key, self.variant.key_chunk)
        crosses = b.less(b.minimum(self._lowest_limit(tile), b.add(first_key, valid)), chunk_end)
        if self.signature.window:
            window_begin = b.sub(self._highest_limit(tile), self.signature.window)
            crosses = b.either(crosses, b.less(first_key, window_begin))
        b.when(crosses, lambda: self._mask(tile, first_key, valid))
        self._softmax(tile)
        self._outputs(tile, valid, b.offset(keys, self.value_offset), b.offset(ahead, self.value_offset))

    # -- the steps of a chunk

    def _scores(self, tile: RowTile, valid: ir.Value, keys: ir.Value, ahead: ir.Value) -> None:
        """S = Q K^T for the chunk: ``row_tile`` x ``key_vectors`` accumulators at a time."""
        v, p = self.variant, self.products
        group_bytes = self.head_steps * p.step_vector_bytes
        zero = b.constant(0.0, p.f32_vector())
        unroll = math.gcd(self.head_steps, _STEPS_PER_ITERATION)
        tile_keys = v.key_vectors * p.lanes

        def key_tile(number: ir.Value) -> None:
            base = b.offset(keys, b.mul(number, v.key_vectors * group_bytes))
            base_ahead = b.offset(ahead, b.mul(number, v.key_vectors * group_bytes))

            def steps(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = list(accumulators)
                at_keys = b.offset(base, b.mul(step, p.step_vector_bytes))
                at_ahead = b.offset(base_ahead, b.mul(step, p.step_vector_bytes))
                at_query = b.offset(tile.queries, b.mul(step, STEP_BYTES))
                for u in range(unroll):
                    places = [k * group_bytes + u * p.step_vector_bytes for k in range(v.key_vectors)]
                    loaded = [p.load_step(b.offset(at_keys, place)) for place in places]
                    self._prefetch(at_ahead, places)
                    for r in range(v.row_tile):
                        query = p.load_broadcast(b.offset(at_query, r * self.query_bytes + u * STEP_BYTES))
                        for k in range(v.key_vectors):
                            i = r * v.key_vectors + k
                            sums[i] = p.dot(sums[i], query, loaded[k])
                return sums

            sums = b.loop(0, self.head_steps, unroll, steps, [zero] * (v.row_tile * v.key_vectors))
            target = b.offset(self.scores, b.mul(number, 4 * tile_keys))
            for i, value in enumerate(sums):
                r, k = divmod(i, v.key_vectors)
                b.store(value, b.offset(target, r * self.score_bytes + k * self.vector_bytes))

        b.loop(0, b.ceil_div(valid, tile_keys), 1, key_tile)

    def _prefetch(self, base: ir.Value, places: list[int]) -> None:
        """Asks for the cache lines that hold these places of the chunk ahead."""
        if self.variant.prefetch:
            for place in places:
                if place % 64 == 0:
                    b.prefetch(b.offset(base, place), _NEAR_CACHE)

    def _each_score(self, row: int | ir.Value, change) -> None:
        """``S[row] = change(S[row], first key of the vector)``, vector by vector."""
        p = self.products
        line = b.offset(self.scores, b.mul(row, self.score_bytes))
        for k in range(self.variant.key_chunk // p.lanes):
            place = b.offset(line, k * self.vector_bytes)
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
        scale = b.constant(self.exponent_scale, type_)
        vectors = self.variant.key_chunk // p.lanes

        def row(number: ir.Value) -> None:
            line = b.offset(self.scores, b.mul(number, self.score_bytes))
            out = b.offset(self.probabilities, b.mul(number, self.probability_bytes))
            state = b.offset(tile.state, b.mul(number, self.state_bytes))
            scores = [b.load(b.offset(line, k * self.vector_bytes), type_) for k in range(vectors)]
            largest = scores[0]
            for value in scores[1:]:
                largest = b.fmax(largest, value)
            before = b.load(state, type_)
            now = b.fmax(before, b.splat(b.widest(largest), p.lanes))
            alpha = p.exp2(b.fmul(b.fsub(before, now), scale))
            shift = b.negate(b.fmul(now, scale))
            total = b.fmul(b.load(b.offset(state, self.vector_bytes), type_), alpha)
            for k, value in enumerate(scores):
                probability = p.exp2(b.fma(value, scale, shift))
                total = b.fadd(total, probability)
                place = k * p.lanes // p.elements_per_step * STEP_BYTES
                p.store_scratch(probability, b.offset(out, place))
            b.store(now, state)
            b.store(total, b.offset(state, self.vector_bytes))
            b.store(alpha, b.offset(self.alphas, b.mul(number, self.vector_bytes)))

        b.loop(0, self.variant.row_tile, 1, row)

    def _outputs(self, tile: RowTile, valid: ir.Value, values: ir.Value, ahead: ir.Value) -> None:
        """O = alpha O + P V, ``value_vectors`` of the head at a time."""
        for first in range(0, self.head_vectors, self.variant.value_vectors):
            count = min(self.variant.value_vectors, self.head_vectors - first)
            self._output_columns(tile, valid, values, ahead, range(first, first + count))

    def _output_columns(
        self, tile: RowTile, valid: ir.Value, values: ir.Value, ahead: ir.Value, columns: range
    ) -> None:
        v, p = self.variant, self.products
        type_ = p.f32_vector()
        line_bytes = self.head_vectors * p.step_vector_bytes
        whole_steps = b.div(valid, p.elements_per_step)
        unroll = math.gcd(v.key_chunk // p.elements_per_step, _STEPS_PER_ITERATION)
        unrolled_end = b.mul(b.div(whole_steps, unroll), unroll)

        def places_of(r: int) -> list[ir.Value]:
            output = b.offset(tile.state, r * self.state_bytes + 2 * self.vector_bytes)
            return [b.offset(output, c * self.vector_bytes) for c in columns]

        def step_of(sums: list[ir.Value], step_values: list[ir.Value], probabilities: ir.Value) -> None:
            for r in range(v.row_tile):
                probability = p.load_broadcast(b.offset(probabilities, r * self.probability_bytes))
                for c, value in enumerate(step_values):
                    i = r * len(columns) + c
                    sums[i] = p.dot(sums[i], probability, value)

        def steps(count: int):
            def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
                sums = list(accumulators)
                at_values = b.offset(values, b.mul(step, line_bytes))
                at_ahead = b.offset(ahead, b.mul(step, line_bytes))
                at_probability = b.offset(self.probabilities, b.mul(step, STEP_BYTES))
                for u in range(count):
                    places = [u * line_bytes + c * p.step_vector_bytes for c in columns]
                    loaded = [p.load_step(b.offset(at_values, place)) for place in places]
                    self._prefetch(at_ahead, places)
                    step_of(sums, loaded, b.offset(at_probability, u * STEP_BYTES))
                return sums

            return body

        sums: list[ir.Value] = []
        for r in range(v.row_tile):
            alpha = b.load(b.offset(self.alphas, r * self.vector_bytes), type_)
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
        line_bytes = self.head_vectors * p.step_vector_bytes

        def body(step: ir.Value, *accumulators: ir.Value) -> list[ir.Value]:
            sums = list(accumulators)
            at_values = b.offset(values, b.mul(step, line_bytes))
            loaded = [p.load_half_step(b.offset(at_values, c * p.step_vector_bytes)) for c in columns]
            step_of(sums, loaded, b.offset(self.probabilities, b.mul(step, STEP_BYTES)))
            return sums

        return body

    # -- endings

    def _finish(self, tokens: ir.Value, state: ir.Value) -> None:
        """output = O / l for every row of the item."""
        s = self.signature

        def row(number: ir.Value) -> None:
            at = b.offset(state, b.mul(number, self.state_bytes))
            total = b.total(b.load(b.offset(at, self.vector_bytes), self.products.f32_vector()))
            outputs = [
                b.load(b.offset(at, (2 + v) * self.vector_bytes), self.products.f32_vector())
                for v in range(self.head_vectors)
            ]
            self._write_row(number, outputs, total)

        b.loop(0, b.mul(tokens, s.queries_per_kv), 1, row)

    def _write_row(self, row: ir.Value, outputs: list[ir.Value], total: ir.Value) -> None:
        s, p = self.signature, self.products
        inverse = b.splat(b.fdiv(b.constant(1.0, b.floating("f32")), total), p.lanes)
        token, head = b.div(row, s.queries_per_kv), b.rem(row, s.queries_per_kv)
        token_offset = b.mul(token, count_argument(self.arguments, "output_stride"))
        elements = b.add(token_offset, b.mul(head, s.head_size))
        target = b.offset(self._first_query("output"), b.mul(elements, p.element_bytes))
        for v, value in enumerate(outputs):
            place = b.offset(target, v * p.lanes * p.element_bytes)
            b.store(p.round(b.fmul(value, inverse)), place, alignment=p.element_bytes)

    def _count_split(self, tokens: ir.Value) -> None:
        """Marks a split as done; whoever finishes the group's last split merges the group."""
        counter = b.offset(argument(self.arguments, "split_counters"), b.mul(item_field(self.item, Item.GROUP), 4))
        done = b.widen(b.atomic_add(counter, 1, bits=32))
        last = b.equal(b.add(done, 1), item_field(self.item, Item.SPLITS))

        def merge() -> None:
            b.store(b.constant(0, b.integer(32)), counter)
            self._merge(tokens)

        b.when(last, merge)

    def _merge(self, tokens: ir.Value) -> None:
        """output = sum_i w_i O_i / sum_i w_i l_i with w_i = 2**(m_i - max m): the log-sum-exp merge of splits."""
        p = self.products
        type_ = p.f32_vector()
        scale = b.constant(self.exponent_scale, type_)
        slot_bytes = self.partial_bytes
        first_slot = b.mul(item_field(self.item, Item.FIRST_PARTIAL), slot_bytes)
        group = b.offset(argument(self.arguments, "partials"), first_slot)
        splits = item_field(self.item, Item.SPLITS)

        def row(number: ir.Value) -> None:
            at = b.offset(group, b.mul(number, self.state_bytes))

            def larger(split: ir.Value, largest: ir.Value) -> list[ir.Value]:
                return [b.fmax(largest, b.load(b.offset(at, b.mul(split, slot_bytes)), type_))]

            (largest,) = b.loop(0, splits, 1, larger, [b.constant(NOTHING_SEEN, type_)])

            def accumulate(split: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                state = b.offset(at, b.mul(split, slot_bytes))
                weight = p.exp2(b.fmul(b.fsub(b.load(state, type_), largest), scale))
                parts = [b.load(b.offset(state, (1 + i) * self.vector_bytes), type_) for i in range(len(sums))]
                return [b.fma(part, weight, sum_) for part, sum_ in zip(parts, sums, strict=True)]

            zero = b.constant(0.0, type_)
            total, *outputs = b.loop(0, splits, 1, accumulate, [zero] * (1 + self.head_vectors))
            self._write_row(number, outputs, b.total(total))

        b.loop(0, b.mul(tokens, self.signature.queries_per_kv), 1, row)
