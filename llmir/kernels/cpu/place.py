"""Where the keys and values of a chunk lie: pieces of memory, each read before the next.

The keys of a piece lie together, and so do its values. A piece is what of a chunk lies in one page, or a part of that
(``Geometry.piece_keys``). A page smaller than a chunk would mean a softmax step for few keys; so a chunk takes several
of them, and what reads it asks for the piece it is in. The pieces after those that are read together are known too,
and are asked for ahead meanwhile: no hardware guesses where the next one lies.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.fields import item_field, token_addresses
from llmir.kernels.cpu.geometry import Geometry
from llmir.kernels.work_list import Item

NEAR_CACHE = 2  # prefetch into the second-level cache: what comes next may be larger than the first
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class ChunkPlace:
    """The pieces of one chunk, in the order they are read: all keys, then all values."""

    geometry: Geometry
    table: ir.Value
    """Addresses of the pieces, and after them, where a variant reads ahead, of those the next chunk begins with."""
    first_piece: ir.Value | int = 0
    """Pieces before this one lie before every window; their addresses are another piece's."""

    def keys(self, piece: ir.Value | int) -> ir.Value:
        """Address of the keys of the chunk's piece ``piece``; from ``chunk_pieces`` on, of its values."""
        return b.load_pointer(self.table, piece)

    def values(self, piece: ir.Value | int) -> ir.Value:
        """Address of the values of the chunk's piece ``piece``; from ``chunk_pieces`` on, of the next chunk's keys."""
        return self.keys(b.add(piece, self.geometry.chunk_pieces))


class PieceTable:
    """Finds the pieces of a chunk; owns the table of their addresses, which the constructor allocates in place."""

    def __init__(self, geometry: Geometry):
        self.geometry = geometry
        pieces = 2 * geometry.chunk_pieces + geometry.pieces_together
        self._table = b.stack_array(pieces * b.POINTER_BYTES)

    def of_gathered(self, keys: ir.Value) -> ChunkPlace:
        """The pieces of a chunk that was gathered at ``keys``."""
        self._set_piece(0, (keys, b.offset(keys, self.geometry.values_offset)))
        return ChunkPlace(self.geometry, self._table)

    def of_pages(self, arguments: ir.Value, item: ir.Value, first_key: ir.Value, next_chunk: ir.Value) -> ChunkPlace:
        """The pieces of the chunk that begins at ``first_key``, and of the one that begins at ``next_chunk``.

        A block table's entries past the item's last key, or before its first window, may be anything: a piece there
        gets the address of the nearest one that is not.
        """
        g, s = self.geometry, self.geometry.spec.attention
        first_piece: ir.Value | int = 0
        if g.chunk_pieces == 1:
            self._set_piece(0, token_addresses(arguments, item, s, first_key))
        else:
            window_begin: ir.Value | int = 0
            if s.mask.window:
                window_begin = b.maximum(b.add(item_field(item, Item.POSITION), 1 - s.mask.window), 0)
                first_piece = b.div(b.maximum(b.sub(window_begin, first_key), 0), g.piece_keys)
            for piece in range(g.chunk_pieces):
                wanted = b.maximum(b.add(first_key, piece * g.piece_keys), window_begin)
                self._set_piece(piece, self._piece(arguments, item, wanted))
        if g.reads_ahead:
            for piece in range(g.pieces_together):
                keys, _ = self._piece(arguments, item, b.add(next_chunk, piece * g.piece_keys))
                self._set(2 * g.chunk_pieces + piece, keys)
        return ChunkPlace(g, self._table, first_piece)

    def _piece(self, arguments: ir.Value, item: ir.Value, key: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Addresses of keys and values of the piece of ``key``, or of the item's last key if it is before that."""
        inside = b.minimum(key, b.sub(item_field(item, Item.KEY_END), 1))
        piece_keys = self.geometry.piece_keys
        first = b.sub(inside, b.rem(inside, piece_keys)) if self.geometry.chunk_pieces > 1 else inside
        return token_addresses(arguments, item, self.geometry.spec.attention, first)

    def _set_piece(self, piece: int, keys_and_values: tuple[ir.Value, ir.Value]) -> None:
        keys, values = keys_and_values
        self._set(piece, keys)
        self._set(self.geometry.chunk_pieces + piece, values)

    def _set(self, place: int, address: ir.Value) -> None:
        b.store(address, b.offset(self._table, place * b.POINTER_BYTES))


def ask_ahead(geometry: Geometry, ahead: ir.Value, at: int, size: int) -> None:
    """Asks for the cache lines that begin within ``size`` bytes at ``ahead + at``, where a variant reads ahead.

    It goes with reading as many bytes: asked for evenly and once, no line waits behind others, and Zen 3 drops what it
    has no place to wait for. Decode took 0.7 to 0.8 of the time of asking for each piece in the first of its passes.
    """
    if geometry.reads_ahead:
        for line in range(-(-at // CACHE_LINE) * CACHE_LINE, at + size, CACHE_LINE):
            b.prefetch(b.offset(ahead, line), NEAR_CACHE)
