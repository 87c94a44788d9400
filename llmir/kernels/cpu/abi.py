"""What the host hands to a compiled kernel: one argument record, and a list of work items (work_list.py).

A kernel is ``void kernel(Arguments *)``. Everything it needs from outside comes through the record, the
OpenMP entry points included, so that a compiled object has no link-time ties to a runtime.
"""

from __future__ import annotations

import ctypes

from llmir.ir.kernel_spec import KernelSpec, KernelVariant
from llmir.kernels.work_list import ITEM_FIELDS
from llmir.targets.registry import lanes_of


class Arguments(ctypes.Structure):
    """One call: append the new keys and values of a layer, then attend. All fields are eight bytes.

    ``strides`` are in elements from one token to the next; heads of a token are contiguous.
    """

    _fields_ = (
        ("query", ctypes.c_void_p),  # [tokens, heads, key_size]
        ("key", ctypes.c_void_p),  # [tokens, KV heads, key_size]
        ("value", ctypes.c_void_p),  # [tokens, KV heads, value_size]
        ("output", ctypes.c_void_p),  # [tokens, heads, value_size]
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
        ("sinks", ctypes.c_void_p),  # float32 [heads], where the attention has sinks
        ("slopes", ctypes.c_void_p),  # float32 [heads], where scores go through ALiBi
        ("positions", ctypes.c_void_p),  # int32 [tokens], there too: each new token's place in its request
    )


#: Byte offset of every field of :class:`Arguments`.
ARGUMENT_OFFSET: dict[str, int] = {name: getattr(Arguments, name).offset for name, _ in Arguments._fields_}


ITEM_BYTES = 4 * ITEM_FIELDS


def state_bytes(spec: KernelSpec) -> int:
    """Bytes of one query row's running state: maximum and sum (a float32 vector each), then the output in vectors."""
    lanes = lanes_of(spec.isa)
    return 4 * lanes * (2 + -(-spec.attention.value_size // lanes))


def padded_rows(spec: KernelSpec, variant: KernelVariant) -> int:
    """Query rows of a full item, rounded up to whole row tiles."""
    rows = variant.max_tokens * spec.attention.queries_per_kv
    return -(-rows // variant.row_tile) * variant.row_tile
