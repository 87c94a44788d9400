"""Emits reads of what the host handed over: fields of the argument record, columns of a work item."""

from __future__ import annotations

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.bindings import ir
from llmir.ir.dtypes import DTYPES
from llmir.kernels.cpu import builder as b
from llmir.kernels.cpu.abi import ARGUMENT_OFFSET
from llmir.kernels.work_list import Item


def argument(arguments: ir.Value, name: str) -> ir.Value:
    """A field of the argument record that holds an address."""
    return b.load(b.offset(arguments, ARGUMENT_OFFSET[name]), b.pointer())


def count_argument(arguments: ir.Value, name: str) -> ir.Value:
    """A field of the argument record that holds a number, i64."""
    return b.load(b.offset(arguments, ARGUMENT_OFFSET[name]), b.integer(64))


def item_field(item: ir.Value, field: Item) -> ir.Value:
    """A column of a work item, as i64."""
    return b.widen(b.load(b.offset(item, 4 * field), b.integer(32)))


def number(table: ir.Value, place: ir.Value | int) -> ir.Value:
    """Entry ``place`` of a table of int32, as i64."""
    return b.widen(b.load(b.offset(table, b.mul(place, 4)), b.integer(32)))


def first_head(arguments: ir.Value, item: ir.Value, attention: AttentionSpec, name: str, token: ir.Value) -> ir.Value:
    """Address of a token's first query head of an item's KV head, in ``query`` or ``output``."""
    row = b.mul(token, count_argument(arguments, f"{name}_stride"))
    size = attention.head_size if name == "query" else attention.value_size
    head = b.mul(item_field(item, Item.KV_HEAD), attention.queries_per_kv * size)
    return b.offset(argument(arguments, name), b.mul(b.add(row, head), DTYPES[attention.dtype].bytes_of(1)))


def number_of_head(
    arguments: ir.Value, item: ir.Value, attention: AttentionSpec, name: str, head: ir.Value
) -> ir.Value:
    """Of ``sinks`` or ``slopes``, float32: that of query head ``head`` of an item's KV head."""
    place = b.add(b.mul(item_field(item, Item.KV_HEAD), attention.queries_per_kv), head)
    return b.load(b.offset(argument(arguments, name), b.mul(place, 4)), b.floating("f32"))


def token_addresses(
    arguments: ir.Value, item: ir.Value, attention: AttentionSpec, position: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Where a key and its value of an item's request and KV head lie, found through the block table.

    In layouts of key groups ``position`` is the first of a group.
    """
    s = attention
    stride = count_argument(arguments, "block_table_stride")
    row = b.mul(item_field(item, Item.REQUEST), stride)
    entry = b.offset(argument(arguments, "block_table"), b.mul(b.add(row, b.div(position, s.cache.block_size)), 4))
    block = b.widen(b.load(entry, b.integer(32)))
    page = b.add(b.mul(block, s.num_kv_heads), item_field(item, Item.KV_HEAD))
    slot = b.rem(position, s.cache.block_size)
    inside = b.mul(slot, s.cache.key_bytes)
    key = b.offset(argument(arguments, "cache"), b.add(b.mul(page, s.cache.head_block_bytes), inside))
    value = b.offset(key, s.cache.values_offset)
    if s.cache.value_bytes != s.cache.key_bytes:
        value = b.offset(value, b.mul(slot, s.cache.value_bytes - s.cache.key_bytes))
    return key, value
