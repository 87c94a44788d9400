"""The table of element types, held against those who have names of their own for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llmir.ir.bindings import ir
from llmir.ir.dtypes import BY_TORCH, CACHE_DTYPES, DTYPES, QUERY_DTYPES, WEIGHT_STORAGE, DType


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_a_name_is_mlirs(dtype: DType) -> None:
    with ir.Context():
        assert str(ir.Type.parse(dtype.name)) == dtype.name


@pytest.mark.parametrize("dtype", BY_TORCH.values(), ids=list(BY_TORCH))
def test_torchs_type_has_as_many_bits(dtype: DType) -> None:
    found = getattr(torch, str(dtype.torch))
    assert isinstance(found, torch.dtype)
    assert dtype.bits == (1 if found is torch.bool else 8 * found.itemsize)
    if dtype.rounding and not found.is_complex and dtype.mantissa:
        assert dtype.rounding == torch.finfo(found).eps / 2


@pytest.mark.parametrize("dtype", [d for d in DTYPES.values() if d.storage and d.bits >= 8], ids=lambda d: d.name)
def test_what_stores_it_has_as_many_bits(dtype: DType) -> None:
    assert np.dtype(dtype.storage).itemsize * 8 == dtype.bits


def test_lists_are_of_the_table() -> None:
    assert {*QUERY_DTYPES, *CACHE_DTYPES, *WEIGHT_STORAGE} <= DTYPES.keys()


def test_bytes_of_half_bytes_are_whole() -> None:
    assert [DTYPES["i4"].bytes_of(count) for count in (1, 2, 64, 65)] == [1, 1, 32, 33]
    assert DTYPES["bf16"].bytes_of(64) == 128
