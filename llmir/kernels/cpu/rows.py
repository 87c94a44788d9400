"""A tile of query rows, as the chunks of keys meet it."""

from __future__ import annotations

from dataclasses import dataclass

from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b


@dataclass(frozen=True)
class RowTile:
    """One tile of rows inside an item's scratch; limits never fall from one row to the next."""

    queries: ir.Value
    state: ir.Value
    limits: ir.Value
    rows: int
    slopes: ir.Value
    """float32, for exponents of two; there where scores go through ALiBi."""
    positions: ir.Value
    """int32, there too: of each row's token. A limit is no measure of it: a part of a cache that many read ends for all
    of them where it ends."""

    def lowest_limit(self) -> ir.Value:
        """The first row's limit; a row sees the keys at positions below its limit."""
        return b.widen(b.load(self.limits, b.integer(32)))

    def highest_limit(self) -> ir.Value:
        """The last row's limit."""
        return b.widen(b.load(b.offset(self.limits, 4 * (self.rows - 1)), b.integer(32)))
