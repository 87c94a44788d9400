"""How a layer's KV cache lies in memory: element type, scales, layout, and every size and offset that follow.

A cache is an array of blocks of ``block_size`` tokens, a block one *head block* for each KV head: all its keys, then
all its values. Inside a head block, with groups of N keys (:meth:`CacheFormat.key_group`):

=======  ==============================================  ==================================
layout   keys                                            values
=======  ==============================================  ==================================
logical  not decided yet: ``[block_size]``, each slot's key with its value behind it
row      ``[block_size][key_size]``                      ``[block_size][value_size]``
lane     ``[block_size / N][key_size][N]``               ``[block_size][value_size]``
pair     ``[block_size / N][key_size / 2][N][2]``        ``[block_size / 2][value_size][2]``
=======  ==============================================  ==================================

"row" has blocks of any size, "lane" and "pair" whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from llmir.ir.dtypes import CACHE_DTYPES, DTYPES

Layout = Literal["logical", "row", "lane", "pair"]
#: One scale of keys and one of values for: nothing; all of a layer; each head; each token of each head; each group of
#: a head's elements.
Scales = Literal["none", "layer", "head", "token_head", "group"]

#: Keys that every group of a packed layout is whole multiples of: the narrowest vector of float32 that packs them.
_LEAST_GROUP = 8


def packed_layout(dtype: str) -> Layout:
    """The layout that products read: of bfloat16 pairs, which a shift and a mask widen where there is no dot product of
    them; of other types one key a lane."""
    return "pair" if dtype == "bf16" else "lane"


@dataclass(frozen=True)
class CacheFormat:
    """The KV cache of one attention layer on one rank; sizes in bytes where they say so."""

    dtype: str
    """Element type, see dtypes.py."""
    num_kv_heads: int
    key_size: int
    """Elements of a head's key."""
    value_size: int
    """Elements of a head's value."""
    block_size: int
    """Tokens in a block."""
    layout: Layout = "logical"
    scales: Scales = "none"
    """Where a cache has scales, keys and values are divided by theirs before they are rounded to ``dtype``."""

    @property
    def quantized(self) -> bool:
        """Whether keys and values are divided by scales."""
        return self.scales != "none"

    @property
    def key_bytes(self) -> int:
        """One key of a head."""
        return DTYPES[self.dtype].bytes_of(self.key_size)

    @property
    def value_bytes(self) -> int:
        """One value of a head."""
        return DTYPES[self.dtype].bytes_of(self.value_size)

    @property
    def token_head_bytes(self) -> int:
        """One token's key and value of one head."""
        return self.key_bytes + self.value_bytes

    @property
    def token_bytes(self) -> int:
        """One token's keys and values, all heads."""
        return self.num_kv_heads * self.token_head_bytes

    @property
    def head_block_bytes(self) -> int:
        """From one head block to the next."""
        return self.block_size * self.token_head_bytes

    @property
    def values_offset(self) -> int:
        """From a head block to its values."""
        return self.block_size * self.key_bytes

    @property
    def step(self) -> int:
        """Elements of a key, and tokens of values, that sit side by side."""
        return 2 if self.layout == "pair" else 1

    def key_group(self, lanes: int) -> int:
        """Keys whose elements lie side by side: two vectors of them, or one where two do not divide a block.

        Two, because a kernel that takes a group at a time then reads memory strictly forward, which is what hardware
        prefetchers follow, and still has enough sums in flight. Of a "row" cache, groups are formed in the kernel's own
        memory, so two vectors always fit. ``lanes``: float32 of a vector.
        """
        return 2 * lanes if self.layout == "row" or self.block_size % (2 * lanes) == 0 else lanes

    def problem(self) -> str | None:
        """The invariant that does not hold, in words."""
        for name in ("num_kv_heads", "key_size", "value_size", "block_size"):
            if getattr(self, name) <= 0:
                return f"{name} of a KV cache must be positive, not {getattr(self, name)}"
        if self.dtype not in CACHE_DTYPES:
            return f"a KV cache holds {', '.join(CACHE_DTYPES)}, not {self.dtype}"
        if self.layout not in get_args(Layout):
            return f"unknown KV cache layout {self.layout!r}; known are {', '.join(get_args(Layout))}"
        if self.scales not in get_args(Scales):
            return f"unknown scales {self.scales!r} of a KV cache; known are {', '.join(get_args(Scales))}"
        if self.layout in ("lane", "pair") and self.block_size % _LEAST_GROUP:
            return f"layout {self.layout!r} needs a block size divisible by {_LEAST_GROUP}, not {self.block_size}"
        if self.key_size % self.step:
            return f"layout {self.layout!r} needs an even key size, not {self.key_size}"
        return None
