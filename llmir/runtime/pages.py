"""A layer's KV cache seen token by token, whatever the layout inside its pages.

Kernels append and read pages themselves. This is for whoever has to look at a cache from outside, or move parts of it:
plain views and copies of the framework's tensors, which come with their own methods, so nothing is imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmir.ir.cache_format import CacheFormat
from llmir.targets.registry import lanes_of


@dataclass(frozen=True)
class TokenRows:
    """The keys, or the values, of a cache: rows ``[heads, head_size]`` by slot (``block * block_size + offset``)."""

    view: Any
    """[blocks, groups, tokens of a group, heads, ...]: a view of the cache, the rest of it one row of a head."""
    head_size: int

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.view.shape[1] * self.view.shape[2]

    def read(self, slots: Any) -> Any:
        """A copy of the rows ``[slots, heads, head_size]`` of int64 ``slots``."""
        return self.view[self._place(slots)].reshape(len(slots), self.view.shape[3], self.head_size)

    def write(self, slots: Any, rows: Any) -> None:
        """Put ``rows`` ``[slots, heads, head_size]`` where ``slots`` say."""
        self.view[self._place(slots)] = rows.reshape(len(slots), *self.view.shape[3:])

    def _place(self, slots: Any) -> tuple[Any, Any, Any]:
        block, offset, group = slots // self.block_size, slots % self.block_size, self.view.shape[2]
        return block, offset // group, offset % group


def key_and_value_rows(pages: Any, cache: CacheFormat, isa: str) -> tuple[TokenRows, TokenRows]:
    """Both halves of ``pages`` ``[blocks, KV heads, 2, block_size * key_size]``, laid out as ``cache`` says."""
    blocks, heads, step = pages.shape[0], cache.num_kv_heads, cache.step
    keys, values = pages[:, :, 0], pages[:, :, 1]
    group = 1 if cache.layout == "row" else cache.key_group(lanes_of(isa))
    # Keys [groups][key_size / step][group][step]; values [block_size / step][value_size][step].
    groups = (cache.block_size // group, cache.key_size // step, group, step)
    keys = keys.view(blocks, heads, *groups).permute(0, 2, 4, 1, 3, 5)
    lines = (cache.block_size // step, cache.value_size, step)
    values = values.view(blocks, heads, *lines).permute(0, 2, 4, 1, 3)
    return TokenRows(keys, cache.key_size), TokenRows(values, cache.value_size)
