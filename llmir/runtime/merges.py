"""Where the parts of a token's attention leave their states, and which states each token is merged from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmir.kernels.work_list import Item
from llmir.runtime.runs import Int32, Int64, in_order, starts


@dataclass(frozen=True)
class Merges:
    """One merge a token that is in parts, ascending; what each is made of, the same for every KV head."""

    tokens: Int32
    """[merges]: rows of query and output."""
    begin: Int32
    """[merges + 1]: a merge's place in ``sources``."""
    sources: Int32
    """Rows of states, of a token's first query head."""
    members: Int32
    """Merges of gathered tokens, where :data:`Item.MEMBERS` says."""
    state_rows: int
    """Rows of states that the items of one KV head leave."""

    @property
    def count(self) -> int:
        """Merges of one KV head."""
        return len(self.tokens)


_NOTHING = np.empty(0, np.int32)
NO_MERGES = Merges(_NOTHING, np.zeros(1, np.int32), _NOTHING, _NOTHING, 0)


def merges_of(tiles: Int32, gathered: Int64, queries_per_kv: int, row_tile: Int64) -> Merges:
    """Gives the tiles that leave states (their :data:`Item.STATE` is not negative) room for them and their merges.

    ``tiles`` [tiles, ITEM_FIELDS] are written in place; ``gathered``: the tokens that :data:`Item.MEMBERS` counts;
    ``row_tile`` [variants]: states are left in whole tiles of rows.
    """
    parts = (tiles[:, Item.STATE] >= 0).nonzero()[0]
    if not len(parts):
        return NO_MERGES
    part = tiles.take(parts, axis=0)
    tile_rows = row_tile[part[:, Item.VARIANT]]
    rows = -(-part[:, Item.TOKENS] * queries_per_kv // tile_rows) * tile_rows
    last_row = rows.cumsum()
    first_row = last_row - rows
    # One entry a token and part: where the token comes from, and where its state goes.
    counts, members = part[:, Item.TOKENS], part[:, Item.MEMBERS]
    last = counts.cumsum()
    first = last - counts
    entry = np.arange(int(last[-1]))
    source = entry * queries_per_kv + (first_row - first * queries_per_kv).repeat(counts)
    gathers = members >= 0
    token = entry + (np.where(gathers, members, part[:, Item.TOKEN]) - first).repeat(counts)
    listed = gathers.repeat(counts).nonzero()[0]
    token[listed] = gathered[token[listed]]
    order, by_token = in_order(token)
    begin = starts(by_token)
    tokens = by_token[begin[:-1]]
    merge_of = np.empty(int(tokens[-1]) + 1, np.int32)
    merge_of[tokens] = np.arange(len(tokens))
    tiles[parts, Item.STATE] = first_row
    tiles[parts, Item.MERGE] = merge_of[token[first]]
    return Merges(
        tokens.astype(np.int32),
        begin.astype(np.int32),
        source[order].astype(np.int32),
        merge_of[gathered],
        int(last_row[-1]),
    )
