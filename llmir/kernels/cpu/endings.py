"""Emits how a work item ends: its output written, or its tokens' states left, to be merged with those of other items.

A token's attention is in parts where its cache was split or shared. Each part leaves a state (m, l, O) for each of the
token's query heads; whoever leaves the last one merges them all.
"""

from __future__ import annotations

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.chunk import NOTHING_SEEN
from llmir.kernels.cpu.fields import argument, count_argument, first_head, item_field, number, number_of_head
from llmir.kernels.cpu.geometry import LOG2_E, Geometry
from llmir.kernels.cpu.members import ItemTokens
from llmir.kernels.work_list import Item


class EndingEmitter:
    """Emits the ends of one variant's items."""

    def __init__(self, geometry: Geometry, arguments: ir.Value, item: ir.Value):
        self.geometry = geometry
        self.products = geometry.products
        self.attention = geometry.spec.attention
        self.arguments = arguments
        self.item = item

    def state(self, row: ir.Value) -> ir.Value:
        """Address of a row of the states of the item's KV head."""
        before = b.mul(item_field(self.item, Item.KV_HEAD), count_argument(self.arguments, "state_rows"))
        return b.offset(argument(self.arguments, "states"), b.mul(b.add(before, row), self.geometry.state_bytes))

    def finish(self, tokens: ir.Value, state: ir.Value) -> None:
        """output = O / l for every row of an item whose tokens follow one another."""
        s = self.attention
        first = item_field(self.item, Item.TOKEN)

        def row(place: ir.Value) -> None:
            g, type_ = self.geometry, self.products.f32_vector()
            at = b.offset(state, b.mul(place, g.state_bytes))
            total = b.load(b.offset(at, g.vector_bytes), type_)
            outputs = [b.load(b.offset(at, (2 + v) * g.vector_bytes), type_) for v in range(g.value_parts.count)]
            token, head = b.div(place, s.queries_per_kv), b.rem(place, s.queries_per_kv)
            if s.sinks:
                own, sink = b.load(at, type_), self._sink(head)
                largest = f.fmax(sink, own)
                weight = self.products.exp2(f.fsub(own, largest))
                total = f.fma(total, weight, self._share_of_sink(sink, largest))
                outputs = [f.fmul(output, weight) for output in outputs]
            self._write_row(b.add(first, token), head, outputs, f.total(total))

        b.loop(0, b.mul(tokens, s.queries_per_kv), 1, row)

    def _write_row(self, token: ir.Value, head: ir.Value, outputs: list[ir.Value], total: ir.Value) -> None:
        s, p = self.attention, self.products
        inverse = f.splat(f.fdiv(b.constant(1.0, b.floating("f32")), total), p.lanes)
        heads = first_head(self.arguments, self.item, s, "output", token)
        target = b.offset(heads, b.mul(head, s.value_size * p.element_bytes))
        for v, value in enumerate(outputs):
            place = b.offset(target, v * p.lanes * p.element_bytes)
            rounded = f.first_lanes(p.round(f.fmul(value, inverse)), self.geometry.value_parts.filled(v))
            b.store(rounded, place, alignment=p.element_bytes)

    def _sink(self, head: ir.Value) -> ir.Value:
        """The score of a query head's sink, as an exponent of two, in every lane."""
        sink = number_of_head(self.arguments, self.item, self.attention, "sinks", head)
        return f.splat(f.fmul(sink, b.constant(LOG2_E, sink.type)), self.products.lanes)

    def _share_of_sink(self, sink: ir.Value, largest: ir.Value) -> ir.Value:
        """What a sink adds to each lane of a sum of weights, whose lanes are summed at the end."""
        weight = self.products.exp2(f.fsub(sink, largest))
        return f.fmul(weight, b.constant(1.0 / self.products.lanes, weight.type))

    def leave(self, tokens: ir.Value, item_tokens: ItemTokens) -> None:
        """Counts the states left for each token; the last one of a token is followed by its merge."""
        head = item_field(self.item, Item.KV_HEAD)
        own_counters = b.mul(head, count_argument(self.arguments, "merges"))

        def token(i: ir.Value) -> None:
            merge = item_tokens.merge(i)
            place = b.mul(b.add(own_counters, merge), 4)
            counter = b.offset(argument(self.arguments, "merge_counters"), place)
            done = b.add(b.widen(b.atomic_add(counter, 1, bits=32)), 1)
            begins = argument(self.arguments, "merge_begin")
            begin, end = number(begins, merge), number(begins, b.add(merge, 1))

            def last() -> None:
                b.store(b.constant(0, b.integer(32)), counter)
                self._merge(merge, begin, end)

            b.when(b.equal(done, b.sub(end, begin)), last)

        b.loop(0, tokens, 1, token)

    def _merge(self, merge: ir.Value, begin: ir.Value, end: ir.Value) -> None:
        """output = sum_i w_i O_i / sum_i w_i l_i with w_i = 2**(m_i - max m): a token's parts, by log-sum-exp."""
        p = self.products
        type_ = p.f32_vector()
        sources = argument(self.arguments, "merge_sources")
        token = number(argument(self.arguments, "merge_tokens"), merge)

        def row(head: ir.Value) -> None:
            def state(source: ir.Value) -> ir.Value:
                return self.state(b.add(number(sources, source), head))

            def larger(source: ir.Value, largest: ir.Value) -> list[ir.Value]:
                return [f.fmax(largest, b.load(state(source), type_))]

            sink = self._sink(head) if self.attention.sinks else None
            least = b.constant(NOTHING_SEEN, type_) if sink is None else sink
            (largest,) = b.loop(begin, end, 1, larger, [least])

            def accumulate(source: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                at = state(source)
                weight = p.exp2(f.fsub(b.load(at, type_), largest))
                parts = [b.load(b.offset(at, (1 + i) * self.geometry.vector_bytes), type_) for i in range(len(sums))]
                return [f.fma(part, weight, sum_) for part, sum_ in zip(parts, sums, strict=True)]

            zero = b.constant(0.0, type_)
            weights = zero if sink is None else self._share_of_sink(sink, largest)
            sums = [weights, *[zero] * self.geometry.value_parts.count]
            total, *outputs = b.loop(begin, end, 1, accumulate, sums)
            self._write_row(token, head, outputs, f.total(total))

        b.loop(0, self.attention.queries_per_kv, 1, row)
