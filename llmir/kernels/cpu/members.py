"""The query tokens of a work item: one after the other in a request, or gathered from several.

Either way an item's tokens are counted from 0. What differs is read without a branch: the address of the entry that
says it is chosen, and of consecutive tokens the count is added.
"""

from __future__ import annotations

from llmir.ir.attention_spec import Mask
from llmir.ir.bindings import ir
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.fields import argument, item_field, number
from llmir.kernels.work_list import Item


class ItemTokens:
    """The tokens of one item."""

    def __init__(self, mask: Mask, arguments: ir.Value, item: ir.Value):
        self._mask, self._arguments, self._item = mask, arguments, item
        self._first = item_field(item, Item.MEMBERS)
        self.gathered = b.at_least(self._first, 0)

    def merge(self, i: ir.Value) -> ir.Value:
        """The merge of token ``i``; only of an item that leaves states, or whose tokens are gathered."""
        listed = b.offset(argument(self._arguments, "members"), b.mul(b.add(self._first, i), 4))
        return self._entry(listed, Item.MERGE, i)

    def token(self, i: ir.Value) -> ir.Value:
        """The row of token ``i`` in query and output."""
        listed = b.select(self.gathered, self.merge(i), b.constant(0))
        return self._entry(b.offset(argument(self._arguments, "merge_tokens"), b.mul(listed, 4)), Item.TOKEN, i)

    def limit(self, i: ir.Value) -> ir.Value:
        """Token ``i`` sees the keys at positions below this."""
        if self._mask.ahead is None:
            return item_field(self._item, Item.KEY_END)
        after_first = b.select(self.gathered, b.constant(0), i)
        return b.add(b.add(item_field(self._item, Item.POSITION), after_first), 1 + self._mask.ahead)

    def _entry(self, listed: ir.Value, column: Item, i: ir.Value) -> ir.Value:
        """The number at ``listed`` where tokens are gathered, else ``i`` more than ``column``."""
        address = b.select(self.gathered, listed, b.offset(self._item, 4 * column))
        return b.add(number(address, 0), b.select(self.gathered, b.constant(0), i))
