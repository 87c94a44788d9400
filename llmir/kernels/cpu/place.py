"""Where the keys and values of a chunk lie: pieces of memory, each read from its beginning to its end.

The keys of a page are a piece and its values are another. A page smaller than a chunk would mean a softmax step for
few keys; so a chunk takes several of them, and what reads it asks for the piece it is in. The pieces after those that
are read together are known too, and are asked for ahead meanwhile: no hardware guesses where the next page lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.fields import item_field, key_address
from llmir.kernels.cpu.geometry import Geometry
from llmir.kernels.work_list import Item


@dataclass(frozen=True)
class ChunkPlace:
    """The pieces of one chunk, in the order they are read: keys page by page, values page by page."""

    geometry: Geometry
    table: ir.Value
    """Addresses of the pieces, and after them, where a variant reads ahead, of those the next chunk begins with."""
    first_page: ir.Value | int = 0
    """Pages before this one lie before every window; their addresses are another page's."""

    def keys(self, page: ir.Value | int) -> ir.Value:
        """Address of the keys of the chunk's page ``page``; of page ``chunk_pages`` and on, of the first values."""
        return b.load_pointer(self.table, page)

    def values(self, page: ir.Value | int) -> ir.Value:
        """Address of the values of the chunk's page ``page``; of page ``chunk_pages`` and on, of the next keys."""
        return self.keys(b.add(page, self.geometry.chunk_pages))


class PieceTable:
    """Finds the pieces of a chunk; owns the table of their addresses, which the constructor allocates in place."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        pieces = 2 * geometry.chunk_pages + geometry.pages_together
        self._table = b.stack_array(pieces * b.POINTER_BYTES)

    def of_gathered(self, keys: ir.Value) -> ChunkPlace:
        """The pieces of a chunk that was gathered at ``keys``."""
        self._set_page(0, keys)
        return ChunkPlace(self.geometry, self._table)

    def of_pages(self, arguments: ir.Value, item: ir.Value, first_key: ir.Value, next_chunk: ir.Value) -> ChunkPlace:
        """The pieces of the chunk that begins at ``first_key``, and of the one that begins at ``next_chunk``.

        A block table's entries past the item's last key, or before its first window, may be anything: a page there
        gets the address of the nearest one that is not.
        """
        g, s = self.geometry, self.geometry.spec.signature
        first_page: ir.Value | int = 0
        if g.chunk_pages == 1:
            self._set_page(0, key_address(arguments, item, s, first_key))
        else:
            window_begin: ir.Value | int = 0
            if s.window:
                window_begin = b.maximum(b.add(item_field(item, Item.POSITION), 1 - s.window), 0)
                first_page = b.div(b.maximum(b.sub(window_begin, first_key), 0), g.page_keys)
            for page in range(g.chunk_pages):
                wanted = b.maximum(b.add(first_key, page * g.page_keys), window_begin)
                self._set_page(page, self._keys(arguments, item, wanted))
        if g.reads_ahead:
            for page in range(g.pages_together):
                keys = self._keys(arguments, item, b.add(next_chunk, page * g.page_keys))
                self._set(2 * g.chunk_pages + page, keys)
        return ChunkPlace(g, self._table, first_page)

    def _keys(self, arguments: ir.Value, item: ir.Value, key: ir.Value) -> ir.Value:
        """Address of the page of ``key``, or of the item's last key if it is before that."""
        inside = b.minimum(key, b.sub(item_field(item, Item.KEY_END), 1))
        page_keys = self.geometry.page_keys
        first = b.sub(inside, b.rem(inside, page_keys)) if self.geometry.chunk_pages > 1 else inside
        return key_address(arguments, item, self.geometry.spec.signature, first)

    def _set_page(self, page: int, keys: ir.Value) -> None:
        self._set(page, keys)
        self._set(self.geometry.chunk_pages + page, b.offset(keys, self.geometry.values_offset))

    def _set(self, piece: int, address: ir.Value) -> None:
        b.store(address, b.offset(self._table, piece * b.POINTER_BYTES))
