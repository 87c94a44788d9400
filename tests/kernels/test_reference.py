"""The reference against hand-made values and against a definition written out in loops."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmir.ir.attention_spec import AttentionSpec
from llmir.kernels import reference
from llmir.targets.registry import lanes_of


def signature(num_heads=2, num_kv_heads=1, head_size=4, element_type="f32", block_size=32, **more):
    more.setdefault("scale", head_size**-0.5)
    return AttentionSpec.dense(num_heads, num_kv_heads, head_size, element_type, block_size, **more)


def by_loops(query, key_cache, value_cache, block_table, seq_lens, query_start, s):
    """Attention as its formula says, one query head and one key at a time."""
    output = np.zeros(query.shape)
    for request, length in enumerate(seq_lens):
        num_new = query_start[request + 1] - query_start[request]
        for i in range(num_new):
            row, position = query_start[request] + i, length - num_new + i
            first = max(0, position - s.mask.window + 1) if s.mask.window else 0
            for head in range(s.num_heads):
                group = head // (s.num_heads // s.num_kv_heads)
                weights, total = [], np.zeros(s.head_size)
                for at in range(first, position + 1):
                    slot = (block_table[request][at // s.cache.block_size], group, at % s.cache.block_size)
                    score = s.scale * math.fsum(query[row, head].astype(float) * key_cache[slot])
                    weights.append(math.exp(s.soft_cap * math.tanh(score / s.soft_cap) if s.soft_cap else score))
                    total += weights[-1] * value_cache[slot].astype(float)
                output[row, head] = total / math.fsum(weights)
    return output


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_attention_is_its_formula(data):
    num_kv_heads = data.draw(st.integers(1, 2))
    s = signature(
        num_heads=num_kv_heads * data.draw(st.integers(1, 3)),
        num_kv_heads=num_kv_heads,
        block_size=data.draw(st.sampled_from([1, 3, 4])),
        window=data.draw(st.sampled_from([0, 1, 2, 5, 100])),
        soft_cap=data.draw(st.sampled_from([0.0, 0.5, 30.0])),
    )
    seq_lens = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    new = [data.draw(st.integers(0, length)) for length in seq_lens]
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    query_start = np.concatenate([[0], np.cumsum(new)])
    max_blocks = -(-max(seq_lens) // s.cache.block_size)
    num_blocks = max_blocks * len(seq_lens)
    block_table = rng.permutation(num_blocks).reshape(len(seq_lens), max_blocks)
    caches = rng.standard_normal((2, num_blocks, s.num_kv_heads, s.cache.block_size, s.head_size)).astype(np.float32)
    query = rng.standard_normal((sum(new), s.num_heads, s.head_size)).astype(np.float32)
    output = reference.attention(query, *caches, block_table, seq_lens, query_start, s)
    np.testing.assert_allclose(output, by_loops(query, *caches, block_table, seq_lens, query_start, s), rtol=1e-10)


def test_one_key_gives_its_value():
    s = signature(block_size=1)
    key, value = np.ones((1, 1, 1, 4), np.float32), np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
    output = reference.attention(np.ones((1, 2, 4), np.float32), key, value, [[0]], [1], [0, 1], s)
    assert output.tolist() == [[[0, 1, 2, 3], [0, 1, 2, 3]]]


@pytest.mark.parametrize("window", [0, 3])
def test_slots_no_query_sees_may_hold_anything(window):
    s = signature(block_size=4, window=window)
    caches = np.full((2, 4, 1, 4, 4), np.nan, np.float32)
    caches[:, 2, 0, 1 if window else 0 :] = 1.0  # the request's first block; the window starts at its slot 1
    caches[:, 1, 0, :2] = 1.0
    output = reference.attention(np.ones((3, 2, 4), np.float32), *caches, [[2, 1, 3]], [6], [0, 3], s)
    np.testing.assert_allclose(output, np.ones((3, 2, 4)), rtol=1e-12)


def test_bf16_caches_are_read_as_their_values():
    rng = np.random.default_rng(0)
    s = signature(element_type="bf16")
    stored = [
        reference.encode(rng.standard_normal(shape), "bf16") for shape in [(1, 2, 4), (1, 1, 32, 4), (1, 1, 32, 4)]
    ]
    exact = [reference.bf16_values(x) for x in stored]
    step = ([[0]], [20], [0, 1], s)
    assert np.array_equal(reference.attention(*stored, *step), reference.attention(*exact, *step))


def test_append_writes_each_token_to_its_slot_and_skips_negative_ones():
    caches = np.zeros((2, 3, 2, 4, 5))
    new = np.random.default_rng(0).standard_normal((2, 3, 2, 5))
    reference.append_kv(*new, np.array([9, -1, 0]), *caches)
    assert np.array_equal(caches[:, 2, :, 1], new[:, 0]) and np.array_equal(caches[:, 0, :, 0], new[:, 2])
    assert np.count_nonzero(caches) == 2 * 2 * 2 * 5


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_bf16_is_the_nearest_value_and_even_on_ties(value):
    bits = int(reference.bf16_bits(np.array([value], np.float32))[0])
    largest = Fraction(float(reference.bf16_values(np.uint16([0x7F7F]))[0]))
    if bits & 0x7FFF == 0x7F80:  # infinity, from half a step beyond the largest value
        assert abs(Fraction(value)) >= largest + largest / 255 / 2
        return
    distance = abs(Fraction(value) - Fraction(float(reference.bf16_values(np.uint16([bits]))[0])))
    for other in (bits - 1, bits + 1):
        if other >> 15 != bits >> 15 or other < 0 or other & 0x7FFF >= 0x7F80:
            continue
        other_distance = abs(Fraction(value) - Fraction(float(reference.bf16_values(np.uint16([other]))[0])))
        assert distance < other_distance or (distance == other_distance and bits % 2 == 0)


def test_bf16_keeps_specials():
    values = np.array([np.nan, np.inf, -np.inf, -0.0], np.float32)
    values = np.append(values, np.uint32([0x7F800001]).view(np.float32))  # a NaN whose payload rounding would lose
    result = reference.bf16_values(reference.bf16_bits(values))
    assert np.array_equal(result, values, equal_nan=True) and np.signbit(result[3])


@given(st.integers(0, 0xFFFF))
def test_bf16_values_round_to_themselves(bits):
    value = reference.bf16_values(np.uint16([bits]))
    if not np.isnan(value[0]):
        assert reference.bf16_bits(value)[0] == bits


LAYOUTS = [
    ("logical", "avx2"),
    ("row", "avx2"),
    ("lane", "avx2"),
    ("pair", "avx2"),
    ("lane", "avx512"),
    ("pair", "avx512_bf16"),
]


@pytest.mark.parametrize(("layout", "isa"), LAYOUTS)
def test_unpack_undoes_pack(layout, isa):
    s = signature(head_size=64, layout=layout)
    caches = np.random.default_rng(0).integers(0, 65536, (2, 3, 2, 32, 64), np.uint16)
    pages = reference.pack_pages(*caches, s.cache, isa)
    assert pages.shape == (3, 2, 2 * 32 * 64)
    assert np.array_equal(reference.unpack_pages(pages, s.cache, isa), caches)


def place(layout, isa, size, dims, slot, dim):
    """Element numbers of (key, value) of one slot and dimension inside a page, from the table of layouts."""
    group, row = 2 * lanes_of(isa), slot * dims + dim
    if layout == "logical":
        return 2 * slot * dims + dim, 2 * slot * dims + dims + dim
    if layout == "row":
        return row, size * dims + row
    if layout == "lane":
        return (slot // group * dims + dim) * group + slot % group, size * dims + row
    key = ((slot // group * (dims // 2) + dim // 2) * group + slot % group) * 2 + dim % 2
    return key, size * dims + (slot // 2 * dims + dim) * 2 + slot % 2


@pytest.mark.parametrize(("layout", "isa"), LAYOUTS)
@given(slot=st.integers(0, 63), dim=st.integers(0, 79))
def test_pack_puts_every_element_in_its_place(layout, isa, slot, dim):
    s = signature(head_size=80, block_size=64, layout=layout)
    caches = np.zeros((2, 1, 1, 64, 80))
    caches[0, 0, 0, slot, dim], caches[1, 0, 0, slot, dim] = 1, 2
    page = reference.pack_pages(*caches, s.cache, isa)[0, 0]
    key, value = place(layout, isa, 64, 80, slot, dim)
    assert (page[key], page[value], np.count_nonzero(page)) == (1, 2, 2)


def test_relative_error_of_bf16_rounding_is_below_its_precision():
    exact = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    error = reference.relative_error(reference.encode(exact, "bf16"), exact)
    assert 2**-11 < error < 2**-8
