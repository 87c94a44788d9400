"""Emits one work item of paged attention, in one variant's tile sizes.

An item is a tile of query rows (tokens x the query heads of one KV head) against a range of one KV head's
cache. The tokens follow one another in a request, or come from many that share the range (members.py). The keys
come in chunks, found through the block table, and the rows in tiles of ``row_tile``; what one chunk does to one tile
of rows is in chunk.py, how an item ends in endings.py. A chunk lies in one page or several (place.py), or, in layout
"row", is gathered from many (staging.py).
"""

from __future__ import annotations

from llmir.ir.bindings import ir
from llmir.ir.kernel_spec import CpuVariant, KernelSpec
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu import floats as f
from llmir.kernels.cpu.chunk import NOTHING_SEEN, ChunkEmitter
from llmir.kernels.cpu.endings import EndingEmitter
from llmir.kernels.cpu.fields import argument, first_head, item_field, number, number_of_head
from llmir.kernels.cpu.geometry import LOG2_E, Geometry
from llmir.kernels.cpu.members import ItemTokens
from llmir.kernels.cpu.place import PieceTable
from llmir.kernels.cpu.rows import RowTile
from llmir.kernels.cpu.staging import StagingEmitter
from llmir.kernels.work_list import Item


class AttentionEmitter:
    """Emits the items of one variant of one kernel."""

    def __init__(self, spec: KernelSpec, variant: CpuVariant):
        self.geometry = Geometry(spec, variant)
        self.attention = spec.attention
        self.variant = variant
        self.products = self.geometry.products

    # -- the item

    def emit_item(self, arguments: ir.Value, item: ir.Value) -> None:
        """The whole item: load queries, walk the chunks, write the output or leave a partial state."""
        s = self.attention
        tokens = item_field(item, Item.TOKENS)
        rows = b.mul(tokens, s.queries_per_kv)
        place = item_field(item, Item.STATE)
        whole = b.less(place, 0)
        g = self.geometry
        self.item, self.arguments = item, arguments
        self.tokens = ItemTokens(s.mask, arguments, item)
        ending = EndingEmitter(g, arguments, item)
        self.state = b.select(whole, b.stack_array(g.padded_rows * g.state_bytes), ending.state(place))
        self.queries = b.stack_array(g.padded_rows * g.query_bytes)
        self.limits = b.stack_array(g.padded_rows * 4)
        self.slopes, self.positions = (b.stack_array(g.padded_rows * 4) if s.alibi else self.limits for _ in range(2))
        self.tiles = b.ceil_div(rows, self.variant.row_tile)
        self._load_queries(rows)
        self._clear_state()
        self._walk_chunks(ChunkEmitter(g))
        b.choose(whole, lambda: ending.finish(tokens, self.state), lambda: ending.leave(tokens, self.tokens))

    def _load_queries(self, rows: ir.Value) -> None:
        """What each row is, into scratch: query, limit, slope, position.

        Padding repeats the last row, so limits never fall.
        """
        s, p = self.attention, self.products
        head_bytes, parts = s.head_size * p.element_bytes, self.geometry.key_parts

        def copy_row(row: ir.Value) -> None:
            inside = b.minimum(row, b.sub(rows, 1))
            token, head = b.div(inside, s.queries_per_kv), b.rem(inside, s.queries_per_kv)
            source = first_head(self.arguments, self.item, s, "query", self.tokens.token(token))
            address = b.offset(source, b.mul(head, head_bytes))
            target = b.offset(self.queries, b.mul(row, self.geometry.query_bytes))
            for v in range(parts.count):
                scratch = p.scratch_bytes(v * p.lanes)
                vector = b.offset(address, v * p.lanes * p.element_bytes)
                p.copy_query(vector, parts.filled(v), b.offset(target, scratch), self.geometry.exponent_scale)
            b.store(b.narrow(self.tokens.limit(token)), b.offset(self.limits, b.mul(row, 4)))
            if s.alibi:
                slope = number_of_head(self.arguments, self.item, s, "slopes", head)
                exponents = f.fmul(slope, b.constant(LOG2_E, slope.type))
                b.store(exponents, b.offset(self.slopes, b.mul(row, 4)))
                position = number(argument(self.arguments, "positions"), self.tokens.token(token))
                b.store(b.narrow(position), b.offset(self.positions, b.mul(row, 4)))

        b.loop(0, b.mul(self.tiles, self.variant.row_tile), 1, copy_row)

    def _clear_state(self) -> None:
        type_ = self.products.f32_vector()

        def clear_row(row: ir.Value) -> None:
            state = b.offset(self.state, b.mul(row, self.geometry.state_bytes))
            b.store(b.constant(NOTHING_SEEN, type_), state)
            for v in range(1, 2 + self.geometry.value_parts.count):
                b.store(b.constant(0.0, type_), b.offset(state, v * self.geometry.vector_bytes))

        b.loop(0, b.mul(self.tiles, self.variant.row_tile), 1, clear_row)

    # -- chunks

    def _walk_chunks(self, chunks: ChunkEmitter) -> None:
        v, s = self.variant, self.attention
        begin, end = item_field(self.item, Item.KEY_BEGIN), item_field(self.item, Item.KEY_END)
        last_chunk = b.add(begin, b.mul(b.div(b.sub(b.sub(end, 1), begin), v.key_chunk), v.key_chunk))
        g = self.geometry
        staging = StagingEmitter(g, self.arguments, self.item) if s.cache.layout == "row" else None
        pieces = PieceTable(g)

        def chunk(first_key: ir.Value) -> None:
            if staging:
                place = pieces.of_gathered(staging.gather(first_key))
            else:
                next_chunk = b.minimum(b.add(first_key, v.key_chunk), last_chunk)
                place = pieces.of_pages(self.arguments, self.item, first_key, next_chunk)
            valid = b.minimum(b.sub(end, first_key), v.key_chunk)

            def tile(number: ir.Value) -> None:
                first = b.mul(number, v.row_tile)
                rows = RowTile(
                    b.offset(self.queries, b.mul(first, self.geometry.query_bytes)),
                    b.offset(self.state, b.mul(first, self.geometry.state_bytes)),
                    b.offset(self.limits, b.mul(first, 4)),
                    v.row_tile,
                    b.offset(self.slopes, b.mul(first, 4)),
                    b.offset(self.positions, b.mul(first, 4)),
                )
                sees_chunk = b.less(first_key, rows.highest_limit())
                if s.mask.window:
                    window_begin = b.sub(rows.lowest_limit(), s.mask.width)
                    sees_chunk = b.both(sees_chunk, b.less(window_begin, b.add(first_key, v.key_chunk)))
                b.when(sees_chunk, lambda: chunks.attend(rows, first_key, valid, place))

            b.loop(0, self.tiles, 1, tile)

        b.loop(begin, end, v.key_chunk, chunk)
