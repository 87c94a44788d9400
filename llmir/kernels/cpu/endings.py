"""Emits how a work item ends: its output written, or, for a split item, its partial state merged with the others'."""

from __future__ import annotations

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.abi import Item
from llmir.kernels.cpu.chunk import NOTHING_SEEN
from llmir.kernels.cpu.fields import argument, count_argument, first_row, item_field
from llmir.kernels.cpu.geometry import Geometry


class EndingEmitter:
    """Emits the ends of one variant's items."""

    def __init__(self, geometry: Geometry, arguments: ir.Value, item: ir.Value):
        self.geometry = geometry
        self.products = geometry.products
        self.signature = geometry.spec.signature
        self.arguments = arguments
        self.item = item

    def finish(self, tokens: ir.Value, state: ir.Value) -> None:
        """output = O / l for every row of the item."""
        s = self.signature

        def row(number: ir.Value) -> None:
            at = b.offset(state, b.mul(number, self.geometry.state_bytes))
            total = b.total(b.load(b.offset(at, self.geometry.vector_bytes), self.products.f32_vector()))
            outputs = [
                b.load(b.offset(at, (2 + v) * self.geometry.vector_bytes), self.products.f32_vector())
                for v in range(self.geometry.head_vectors)
            ]
            self._write_row(number, outputs, total)

        b.loop(0, b.mul(tokens, s.queries_per_kv), 1, row)

    def _write_row(self, row: ir.Value, outputs: list[ir.Value], total: ir.Value) -> None:
        s, p = self.signature, self.products
        inverse = b.splat(b.fdiv(b.constant(1.0, b.floating("f32")), total), p.lanes)
        token, head = b.div(row, s.queries_per_kv), b.rem(row, s.queries_per_kv)
        token_offset = b.mul(token, count_argument(self.arguments, "output_stride"))
        elements = b.add(token_offset, b.mul(head, s.head_size))
        target = b.offset(first_row(self.arguments, self.item, s, "output"), b.mul(elements, p.element_bytes))
        for v, value in enumerate(outputs):
            place = b.offset(target, v * p.lanes * p.element_bytes)
            b.store(p.round(b.fmul(value, inverse)), place, alignment=p.element_bytes)

    def count_split(self, tokens: ir.Value) -> None:
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
        scale = b.constant(self.geometry.exponent_scale, type_)
        slot_bytes = self.geometry.partial_bytes
        first_slot = b.mul(item_field(self.item, Item.FIRST_PARTIAL), slot_bytes)
        group = b.offset(argument(self.arguments, "partials"), first_slot)
        splits = item_field(self.item, Item.SPLITS)

        def row(number: ir.Value) -> None:
            at = b.offset(group, b.mul(number, self.geometry.state_bytes))

            def larger(split: ir.Value, largest: ir.Value) -> list[ir.Value]:
                return [b.fmax(largest, b.load(b.offset(at, b.mul(split, slot_bytes)), type_))]

            (largest,) = b.loop(0, splits, 1, larger, [b.constant(NOTHING_SEEN, type_)])

            def accumulate(split: ir.Value, *sums: ir.Value) -> list[ir.Value]:
                state = b.offset(at, b.mul(split, slot_bytes))
                weight = p.exp2(b.fmul(b.fsub(b.load(state, type_), largest), scale))
                parts = [b.load(b.offset(state, (1 + i) * self.geometry.vector_bytes), type_) for i in range(len(sums))]
                return [b.fma(part, weight, sum_) for part, sum_ in zip(parts, sums, strict=True)]

            zero = b.constant(0.0, type_)
            total, *outputs = b.loop(0, splits, 1, accumulate, [zero] * (1 + self.geometry.head_vectors))
            self._write_row(number, outputs, b.total(total))

        b.loop(0, b.mul(tokens, self.signature.queries_per_kv), 1, row)
