"""The work list of attention kernels: what a thread of a CPU, or a thread block of a GPU, does at a time."""

from __future__ import annotations

from enum import IntEnum


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
