"""Emits append_kv: new keys and values of a layer into the pages of its cache.

Threads share the tokens evenly. A token's slot is ``block * block_size + offset``; a negative slot (padding)
is left out. In layout "row" a key and a value are copied as they are. Consecutive tokens of a "pair" page share cache
lines of values, so values are written lane by lane, never read and written back: two threads may hold the two
halves of one pair.
"""

from __future__ import annotations

import math

from llmir.ir.bindings import ir
from llmir.ir.kernel_spec import KernelSpec
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.fields import argument, count_argument
from llmir.kernels.cpu.geometry import VectorParts
from llmir.kernels.cpu.products import Products

_UNROLL = 8


class AppendEmitter:
    """Emits append_kv for one spec."""

    def __init__(self, spec: KernelSpec):
        self.attention = spec.attention
        self.products = Products.of(spec)
        self.key_group = spec.attention.cache.key_group(self.products.lanes)
        self.value_parts = VectorParts(spec.attention.value_size, self.products.lanes)

    def emit(self, arguments: ir.Value, thread: ir.Value, threads: ir.Value) -> None:
        """Appends this thread's share of the call's tokens; thread numbers are i64."""
        s, p = self.attention, self.products
        tokens = count_argument(arguments, "append_tokens")
        first = b.div(b.mul(tokens, thread), threads)
        end = b.div(b.mul(tokens, b.add(thread, 1)), threads)
        slots, cache = argument(arguments, "slots"), argument(arguments, "cache")
        sources = [
            (argument(arguments, name), b.mul(count_argument(arguments, f"{name}_stride"), p.element_bytes))
            for name in ("key", "value")
        ]

        def token(number: ir.Value) -> None:
            slot = b.load(b.offset(slots, b.mul(number, 8)), b.integer(64))
            key, value = (b.offset(base, b.mul(number, stride)) for base, stride in sources)

            def head(index: ir.Value) -> None:
                page = b.add(b.mul(b.div(slot, s.cache.block_size), s.num_kv_heads), index)
                keys = b.offset(cache, b.mul(page, s.cache.head_block_bytes))
                values = b.offset(keys, s.cache.values_offset)
                own_key = b.offset(key, b.mul(index, s.cache.key_bytes))
                own_value = b.offset(value, b.mul(index, s.cache.value_bytes))
                place = b.rem(slot, s.cache.block_size)
                if s.cache.layout == "row":
                    self._append_row(own_key, keys, place, s.head_size)
                    self._append_row(own_value, values, place, s.value_size)
                else:
                    self._append_key(own_key, keys, place)
                    self._append_value(own_value, values, place)

            def heads() -> None:
                b.loop(0, s.num_kv_heads, 1, head)

            b.when(b.at_least(slot, 0), heads)

        b.loop(first, end, 1, token)

    def _append_row(self, source: ir.Value, rows: ir.Value, place: ir.Value, size: int) -> None:
        """One key or value of ``size`` elements into row ``place`` of ``[block_size][size]``."""
        p, parts = self.products, VectorParts(size, self.products.lanes)
        target = b.offset(rows, b.mul(place, size * p.element_bytes))
        for v in range(parts.count):
            at = v * p.lanes * p.element_bytes
            b.store(self._load_part(source, parts, v), b.offset(target, at), alignment=p.element_bytes)

    def _load_part(self, source: ir.Value, parts: VectorParts, number: int) -> ir.Value:
        """Vector ``number`` of a new key or value, as integers."""
        p = self.products
        vector = b.vector_of(parts.filled(number), b.integer(8 * p.element_bytes))
        return b.load(b.offset(source, number * p.lanes * p.element_bytes), vector, alignment=p.element_bytes)

    def _append_key(self, source: ir.Value, keys: ir.Value, place: ir.Value) -> None:
        """One key into column ``place`` of ``[block_size / group][steps][group][elements per step]``."""
        s, p = self.attention, self.products
        step_bytes = p.elements_per_step * p.element_bytes
        steps = s.head_size // p.elements_per_step
        line_bytes = self.key_group * step_bytes
        group = b.mul(b.div(place, self.key_group), steps * line_bytes)
        column = b.offset(keys, b.add(group, b.mul(b.rem(place, self.key_group), step_bytes)))
        self._scatter(source, column, steps, step_bytes, line_bytes)

    def _append_value(self, source: ir.Value, values: ir.Value, place: ir.Value) -> None:
        """One value into row ``place`` of ``[block_size / elements per step][value_size][elements per step]``."""
        s, p = self.attention, self.products
        line_bytes = s.cache.value_bytes * p.elements_per_step
        line = b.offset(values, b.mul(b.div(place, p.elements_per_step), line_bytes))
        if p.pairs and not p.instructions.masks:
            half = b.offset(line, b.mul(b.rem(place, 2), p.element_bytes))
            self._scatter(source, half, s.value_size, p.element_bytes, 2 * p.element_bytes)
            return
        for v in range(self.value_parts.count):
            raw = self._load_part(source, self.value_parts, v)
            target = b.offset(line, v * p.step_vector_bytes)
            if p.pairs:
                self._store_half(raw, target, b.rem(place, 2))
            else:
                b.store(raw, target, alignment=p.element_bytes)

    def _store_half(self, raw: ir.Value, target: ir.Value, half: ir.Value) -> None:
        """A vector of 16-bit values into the even (``half`` 0) or odd lanes at ``target``, by one masked store."""
        lanes = 2 * raw.type.shape[0]
        both_halves = f.interleave(raw, raw)
        odd = b.equal(
            b.rem(b.lane_numbers(lanes), b.constant(2, b.vector_of(lanes, b.integer(32)))),
            f.splat(b.narrow(half), lanes),
        )
        b.store_lanes(both_halves, target, odd, alignment=2)

    def _scatter(self, source: ir.Value, target: ir.Value, count: int, word_bytes: int, stride: int) -> None:
        """``count`` words that lie side by side, each ``stride`` bytes after the one before."""
        word, unroll = b.integer(8 * word_bytes), math.gcd(count, _UNROLL)

        def some(first: ir.Value) -> None:
            at_source, at_target = b.offset(source, b.mul(first, word_bytes)), b.offset(target, b.mul(first, stride))
            for u in range(unroll):
                value = b.load(b.offset(at_source, u * word_bytes), word, alignment=self.products.element_bytes)
                b.store(value, b.offset(at_target, u * stride), alignment=word_bytes)

        b.loop(0, count, unroll, some)
