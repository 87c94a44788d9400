"""Emits staging: a chunk of keys and values gathered from the rows of many pages.

Pages of layout "row" hold as many tokens as the framework likes, down to one, and blocks lie anywhere. A chunk of
them is brought into the thread's own memory in the layout that the products read, so that all that follows is the
same for every cache:

    rows      the address of every key of the chunk, through the block table; zeros stand in for what is not read
    keys      row by row into columns: squares of 32-bit words transposed in registers
    values    rows as they are, or two of them interleaved
"""

from __future__ import annotations

from collections.abc import Iterator

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.fields import item_field, token_addresses
from llmir.kernels.cpu.geometry import Geometry
from llmir.kernels.cpu.place import CACHE_LINE, NEAR_CACHE
from llmir.kernels.work_list import Item

_WORD_BYTES = 4
#: x86 shuffles two registers most cheaply within lanes of 128 bits: four words.
_LANE_WORDS = 4


class StagingEmitter:
    """Emits the gathering of one variant's chunks; owns their memory, which the constructor allocates in place."""

    def __init__(self, geometry: Geometry, arguments: ir.Value, item: ir.Value):
        self.geometry = g = geometry
        self.products = g.products
        self.attention = g.spec.attention
        self.variant = g.variant
        self.arguments, self.item = arguments, item
        self.keys = b.stack_array(g.values_offset + g.variant.key_chunk * self.attention.cache.value_bytes)
        pointers = b.POINTER_BYTES * (g.variant.key_chunk + g.variant.prefetch)
        self.key_rows, self.value_rows = b.stack_array(pointers), b.stack_array(pointers)
        zero_bytes = max(self.attention.cache.key_bytes, self.attention.cache.value_bytes)
        self.zeros = b.stack_array(zero_bytes)
        zero = b.constant(0, self._words())
        for at in range(0, zero_bytes, g.vector_bytes):
            b.store(zero, b.offset(self.zeros, min(at, zero_bytes - g.vector_bytes)), alignment=_WORD_BYTES)

    def gather(self, first_key: ir.Value) -> ir.Value:
        """Gathers the chunk that begins at ``first_key``; gives the address of its keys.

        Keys outside the item's range or before its first window are not read, and are zero.
        """
        valid = b.minimum(b.sub(item_field(self.item, Item.KEY_END), first_key), self.variant.key_chunk)
        tile_keys = self.variant.key_vectors * self.products.lanes  # the products read whole tiles
        count = b.mul(b.ceil_div(valid, tile_keys), tile_keys)
        self._find_rows(first_key, b.add(count, self.variant.prefetch))
        b.loop(0, count, self.products.lanes, self._stage_tile)
        return self.keys

    # -- rows

    def _find_rows(self, first_key: ir.Value, count: ir.Value) -> None:
        """Addresses of ``count`` keys and values, in order."""
        end = item_field(self.item, Item.KEY_END)

        def find(number: ir.Value) -> None:
            position = b.add(first_key, number)
            # A table's entries past the end may be anything, or not be there.
            last = b.minimum(position, b.sub(end, 1))
            key, value = token_addresses(self.arguments, self.item, self.attention, last)
            needed = b.less(position, end)
            if self.attention.mask.window:
                window_begin = b.add(item_field(self.item, Item.POSITION), 1 - self.attention.mask.window)
                needed = b.both(needed, b.at_least(position, window_begin))
            place = b.mul(number, b.POINTER_BYTES)
            b.store(b.select(needed, key, self.zeros), b.offset(self.key_rows, place))
            b.store(b.select(needed, value, self.zeros), b.offset(self.value_rows, place))

        b.loop(0, count, 1, find)

    def _ask_ahead(self, rows: ir.Value, at: ir.Value | int) -> None:
        """Asks for the cache line at ``at`` of the row that is ``prefetch`` keys ahead of the first of ``rows``."""
        if self.variant.prefetch:
            b.prefetch(b.offset(b.load_pointer(rows, self.variant.prefetch), at), NEAR_CACHE)

    # -- one vector's worth of keys and their values

    def _stage_tile(self, first: ir.Value) -> None:
        g, p = self.geometry, self.products
        group, inside = b.div(first, g.group_vectors * p.lanes), b.rem(first, g.group_vectors * p.lanes)
        step_bytes = p.elements_per_step * p.element_bytes
        column = b.offset(self.keys, b.add(b.mul(group, g.key_group_bytes), b.mul(inside, step_bytes)))
        self._stage_keys(b.offset(self.key_rows, b.mul(first, b.POINTER_BYTES)), column)
        values = b.offset(self.keys, b.add(g.values_offset, b.mul(first, self.attention.cache.value_bytes)))
        self._stage_values(b.offset(self.value_rows, b.mul(first, b.POINTER_BYTES)), values)

    def _stage_keys(self, rows: ir.Value, column: ir.Value) -> None:
        """``lanes`` rows into a column of ``[steps][group][elements per step]``, a cache line of each at a time.

        Where a row is no whole number of cache lines, the last one begins earlier, and some words are staged twice.
        """
        g, p, row_bytes = self.geometry, self.products, self.attention.cache.key_bytes

        def line(first: ir.Value) -> None:
            start = b.minimum(first, row_bytes - CACHE_LINE)
            for i in range(p.lanes):
                self._ask_ahead(b.offset(rows, i * b.POINTER_BYTES), start)
            for part in range(0, CACHE_LINE, g.vector_bytes):
                at = b.add(start, part)
                words = [
                    b.load(b.offset(b.load_pointer(rows, i), at), self._words(), alignment=p.element_bytes)
                    for i in range(p.lanes)
                ]
                step = b.div(at, p.elements_per_step * p.element_bytes)
                target = b.offset(column, b.mul(step, g.key_line_bytes))
                for number, vector in enumerate(self._steps(transposed(words))):
                    b.store(vector, b.offset(target, number * g.key_line_bytes), alignment=p.element_bytes)

        b.loop(0, row_bytes, CACHE_LINE, line)

    def _steps(self, words: list[ir.Value]) -> Iterator[ir.Value]:
        """Vectors of one word of every key as vectors of one reduction step: a word holds one step, or two."""
        for vector in words:
            if self.products.elements_per_step * self.products.element_bytes == _WORD_BYTES:
                yield vector
            else:
                yield from f.halves(vector, self.products.lanes)

    def _stage_values(self, rows: ir.Value, values: ir.Value) -> None:
        """``lanes`` rows into ``[steps][value_size][elements per step]``."""
        p, parts, row_bytes = self.products, self.geometry.value_parts, self.attention.cache.value_bytes

        def step(first: ir.Value) -> None:
            own = b.offset(rows, b.mul(first, b.POINTER_BYTES))
            sources = [b.load_pointer(own, i) for i in range(p.elements_per_step)]
            for i in range(p.elements_per_step):
                for at in range(0, row_bytes, CACHE_LINE):
                    self._ask_ahead(b.offset(own, i * b.POINTER_BYTES), at)
            target = b.offset(values, b.mul(first, row_bytes))
            for v in range(parts.count):
                at = v * p.lanes * p.element_bytes
                part = b.vector_of(parts.filled(v), b.integer(8 * p.element_bytes))
                loaded = [b.load(b.offset(row, at), part, alignment=p.element_bytes) for row in sources]
                vector = f.interleave(*loaded) if p.pairs else loaded[0]
                b.store(vector, b.offset(target, v * p.step_vector_bytes), alignment=p.element_bytes)

        b.loop(0, p.lanes, p.elements_per_step, step)

    def _words(self) -> ir.Type:
        return b.vector_of(self.products.lanes, b.integer(32))


def transposed(rows: list[ir.Value]) -> list[ir.Value]:
    """The columns of a square of words, row ``i`` in ``rows[i]``.

    Each round takes neighbouring rows apart into even and odd places: single words within lanes of 128 bits, twice,
    then whole lanes.
    """
    size = len(rows)
    for round_ in range(size.bit_length() - 1):
        unit, span = (1, _LANE_WORDS) if round_ < _LANE_WORDS.bit_length() - 1 else (_LANE_WORDS, size)
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        rows = [
            f.shuffle(first, second, _every_other(parity, unit, span, size))
            for parity in (0, 1)
            for first, second in pairs
        ]
    return rows


def _every_other(parity: int, unit: int, span: int, size: int) -> list[int]:
    """Of two vectors of ``size`` words, span by span, the even (0) or odd units of the first, then of the second."""
    return [
        source + base + at + word
        for base in range(0, size, span)
        for source in (0, size)
        for at in range(parity * unit, span, 2 * unit)
        for word in range(unit)
    ]
