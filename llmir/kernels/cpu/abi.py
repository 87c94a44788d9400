"""What the host hands to a compiled kernel: one argument record, and a list of work items.

A kernel is ``void kernel(Arguments *)``. Everything it needs from outside comes through the record, the
OpenMP entry points included, so that a compiled object has no link-time ties to a runtime.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum

from llmir.ir.signature import LANES, KernelSpec, KernelVariant


class Arguments(ctypes.Structure):
    """One call: append the new keys and values of a layer, then attend. All fields are eight bytes.

    ``strides`` are in elements from one token to the next; heads of a token are contiguous.
    """

    _fields_ = (
        ("query", ctypes.c_void_p),  # [tokens, heads, head_size]
        ("key", ctypes.c_void_p),  # [tokens, KV heads, head_size]
        ("value", ctypes.c_void_p),  # [tokens, KV heads, head_size]
        ("output", ctypes.c_void_p),  # [tokens, heads, head_size]
        ("cache", ctypes.c_void_p),  # [blocks, KV heads, page]
        ("slots", ctypes.c_void_p),  # int64 [append_tokens]: block * block_size + offset, negative: none
        ("block_table", ctypes.c_void_p),  # int32 [requests, block_table_stride]
        ("items", ctypes.c_void_p),  # int32 [item_count, ITEM_FIELDS]
        ("states", ctypes.c_void_p),  # float32 [KV heads, state_rows, state]: what items leave to be merged
        ("members", ctypes.c_void_p),  # int32: merges of gathered tokens, item by item
        ("merge_tokens", ctypes.c_void_p),  # int32 [merges]: the token whose states are merged
        ("merge_begin", ctypes.c_void_p),  # int32 [merges + 1]: its place in merge_sources
        ("merge_sources", ctypes.c_void_p),  # int32: rows of states, of a token's first query head
        ("merge_counters", ctypes.c_void_p),  # int32 [KV heads, merges], zero before and after a call
        ("query_stride", ctypes.c_int64),
        ("key_stride", ctypes.c_int64),
        ("value_stride", ctypes.c_int64),
        ("output_stride", ctypes.c_int64),
        ("block_table_stride", ctypes.c_int64),
        ("append_tokens", ctypes.c_int64),
        ("item_count", ctypes.c_int64),
        ("state_rows", ctypes.c_int64),
        ("merges", ctypes.c_int64),
        ("next_item", ctypes.c_int64),  # the kernel's own work counter
        ("threads", ctypes.c_int64),
        ("gomp_parallel", ctypes.c_void_p),
        ("gomp_barrier", ctypes.c_void_p),
        ("omp_get_thread_num", ctypes.c_void_p),
        ("omp_get_num_threads", ctypes.c_void_p),
    )


#: Byte offset of every field of :class:`Arguments`.
ARGUMENT_OFFSET: dict[str, int] = {name: getattr(Arguments, name).offset for name, _ in Arguments._fields_}


class Item(IntEnum):
    """Columns of a work item (int32): some query tokens against a range of one KV head's cache.

    The tokens follow one another in one request; or they are gathered from requests that share the range, and then
    each of them sees all of it.
    """

    VARIANT = 0  # position in KernelSpec.variants
    TOKEN = 1  # first query token, a row of query and output; not looked at where tokens are gathered
    TOKENS = 2
    KV_HEAD = 3
    REQUEST = 4  # row of the block table
    POSITION = 5  # of the first query token in its request; where tokens are gathered, KEY_END - 1
    KEY_BEGIN = 6  # where a chunk may begin: in a block, a multiple of the variant's key_chunk
    KEY_END = 7
    STATE = 8  # where the states go: a row of states, or -1: finish and write the output
    MERGE = 9  # merge of the first token, those of the others follow; not looked at where tokens are gathered
    MEMBERS = 10  # where tokens are gathered, the place of the first one's merge in members; else -1


ITEM_FIELDS = len(Item)
ITEM_BYTES = 4 * ITEM_FIELDS


def state_bytes(spec: KernelSpec) -> int:
    """Bytes of one query row's running state: maximum and sum (a float32 vector each), then the output."""
    return 4 * (2 * LANES[spec.isa] + spec.signature.head_size)


def padded_rows(spec: KernelSpec, variant: KernelVariant) -> int:
    """Query rows of a full item, rounded up to whole row tiles."""
    rows = variant.max_tokens * spec.signature.queries_per_kv
    return -(-rows // variant.row_tile) * variant.row_tile
