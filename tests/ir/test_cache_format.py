"""Sizes and offsets of a cache, held against arrays that really lie so."""

from __future__ import annotations

import numpy as np
import pytest

from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.cache_format import CacheFormat
from llmir.kernels import reference


def test_a_half_byte_cache_has_half_the_bytes() -> None:
    half, whole = (CacheFormat(dtype, 3, 64, 64, 16, scales="group") for dtype in ("i4", "i8"))
    assert half.problem() is None
    for name in ("key_bytes", "value_bytes", "token_head_bytes", "token_bytes", "head_block_bytes", "values_offset"):
        assert 2 * getattr(half, name) == getattr(whole, name)


def test_keys_and_values_may_be_of_two_sizes() -> None:
    cache = CacheFormat("bf16", 1, key_size=576, value_size=512, block_size=16)
    assert (cache.key_bytes, cache.value_bytes, cache.values_offset) == (1152, 1024, 16 * 1152)
    assert cache.head_block_bytes == 16 * (1152 + 1024)


@pytest.mark.parametrize(("dtype", "layout"), [("bf16", "pair"), ("f16", "lane"), ("f32", "row"), ("bf16", "row")])
def test_offsets_are_where_the_reference_packs(dtype: str, layout: str) -> None:
    cache = AttentionSpec.dense(6, 3, 64, dtype, 32, 0.125, layout=layout).cache  # type: ignore[arg-type]
    keys = reference.encode(np.full((2, 3, 32, 64), 1.0, np.float32), dtype)
    values = reference.encode(np.full((2, 3, 32, 64), 2.0, np.float32), dtype)
    pages = reference.pack_pages(keys, values, cache, "avx2")
    assert pages[0].nbytes == 3 * cache.head_block_bytes == 32 * cache.token_bytes
    head_block = pages[1, 2].view(np.uint8)
    assert head_block[: cache.values_offset].tobytes() == keys[1, 2].tobytes()
    assert head_block[cache.values_offset :].tobytes() == values[1, 2].tobytes()
