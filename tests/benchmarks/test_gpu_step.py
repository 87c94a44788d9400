"""Batches and steps of the GPU benchmark."""

import numpy as np
import pytest
import torch
from on_gpu.batches import LLAMA, TINY, Batch, decode, skewed, timed
from on_gpu.step import Features, exact_rows, from_pages, relative_error, to_pages
from small_steps import DECODE, MIXED, TREE, step_of
from specs import changed

from llmir.ir.attention_spec import AttentionSpec
from llmir.kernels import reference

SIGNATURE = AttentionSpec.dense(4, 2, 64, "f32", block_size=16, scale=64**-0.5, layout="row")


@pytest.mark.parametrize(
    "features", [Features(), Features(window=7), Features(soft_cap=2.0), Features(sinks=True)], ids=str
)
def test_the_exact_answer_is_the_references(features):
    torch.manual_seed(1)
    query, keys, values = torch.randn(5, 4, 64), torch.randn(32, 2, 64), torch.randn(32, 2, 64)
    sinks = torch.randn(4) if features.sinks else None
    exact = exact_rows(query, torch.arange(27, 32), keys, values, features, sinks)
    attention = changed(SIGNATURE, window=features.window, soft_cap=features.soft_cap, sinks=features.sinks)
    caches = (x.view(2, 16, 2, 64).transpose(1, 2).numpy() for x in (keys, values))
    lengths = (np.array([[0, 1]]), np.array([32]), np.array([0, 5]))
    expected = reference.attention(query.numpy(), *caches, *lengths, attention, sinks)
    assert np.allclose(exact.numpy(), expected, rtol=1e-12)


def test_pages_are_those_of_layout_row():
    keys, values = torch.randn(2, 48, 2, 64)
    pages = torch.empty(3, 2, 2, 16, 64)
    to_pages(keys, values, 16, pages)
    caches = (x.view(3, 16, 2, 64).transpose(1, 2).numpy() for x in (keys, values))
    assert np.array_equal(pages.view(3, 2, -1).numpy(), reference.pack_pages(*caches, SIGNATURE.cache, "avx2"))


def test_pages_can_be_read_back():
    keys, values = torch.randn(2, 48, 2, 64)
    pages = torch.empty(3, 2, 2, 16, 64)
    to_pages(keys, values, 16, pages)
    assert all(torch.equal(*pair) for pair in zip(from_pages(pages), (keys, values), strict=True))


def test_requests_of_a_group_have_the_same_blocks_where_they_share():
    table, _ = TREE.placement(16, np.random.default_rng(0))
    assert [len(set(table[:, column])) for column in range(3)] == [1, 1, 2]


def test_no_two_requests_share_a_block_of_their_own():
    table, units = TREE.placement(16, np.random.default_rng(0))
    own = table[:, 3:]
    assert len(set(own[own < units])) == (own < units).sum()


def test_columns_that_a_request_does_not_need_lead_to_nobodys_block():
    table, units = DECODE.placement(16, np.random.default_rng(0))
    assert (table[0] == units).tolist() == [False, True, True]


def test_a_table_of_smaller_pages_leads_to_the_same_slots():
    step = step_of(MIXED)
    pages, blocks = step.host_table(4), step.host_table(16)
    assert (pages[0, :8] * 4).tolist() == [int(block) * 16 + 4 * n for block in blocks[0] for n in range(4)]


def test_shared_tokens_are_counted_once():
    batch = Batch("shared", TINY, (1, 1), (10, 20), ((1, 100),))
    assert batch.kv_bytes == 130 * TINY.token_bytes


def test_products_of_a_causal_prefill_are_half_of_all():
    batch = Batch("prefill", TINY, (100,), (100,))
    assert batch.flops == 4 * TINY.num_heads * TINY.head_size * 5050


def test_no_case_is_timed_twice():
    names = [(batch.name, batch.shape) for batch in timed()]
    assert len(set(names)) == len(names)


def test_every_size_of_decode_that_was_asked_for_is_timed():
    sizes = {(batch.name, batch.shape) for batch in timed()}
    asked = [decode(LLAMA, requests, context << 10) for requests in (1, 4, 16, 64, 256) for context in (1, 4, 8, 32)]
    assert {(batch.name, batch.shape) for batch in asked} <= sizes


def test_skewed_lengths_hold_the_longest():
    assert max(skewed(64, 4096)) == 4096


def test_nan_is_wrong():
    assert not relative_error(torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2))[0] < 1
