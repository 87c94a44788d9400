from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llmir.costs.sharing import Readers, cached_key
from llmir.ir.kernel_spec import SharingCosts

TILE = 6
#: A key takes 20 ns from memory, 4 ns from a small cache and 12 from a large one; a tile of rows 2 ns, and a row of
#: those that decode 0.5 ns.
COSTS = SharingCosts(
    most_rows=48,
    least_tokens=128,
    read_key=20.0,
    cached_key=((256, 4.0), (1024, 8.0), (4096, 12.0)),
    tile_key=2.0,
    decode_rows=4,
    decode_row_key=0.5,
    row=100.0,
    margin=0.9,
)


@pytest.mark.parametrize(
    ("tokens", "time"), [(1, 4.0), (256, 4.0), (640, 6.0), (1024, 8.0), (2560, 10.0), (4096, 12.0), (10**6, 12.0)]
)
def test_cached_key_is_linear_between_points_and_constant_beyond(tokens, time):
    assert cached_key(COSTS, tokens) == pytest.approx(time)


def test_alone_reads_from_memory_once_and_from_the_cache_after_that():
    assert Readers(COSTS, np.array([4, 4, 4]), TILE).alone(1024) == pytest.approx(1024 * (20 + 2 + 8 + 8))


def test_alone_takes_the_products_where_they_take_longer():
    rows = np.array([4, 48, 72])  # 2, 16 and 24 ns a key: four rows of decode, 8 and 12 tiles
    assert Readers(COSTS, rows, TILE).alone(1024) == pytest.approx(1024 * (20 + 24 + 16 + 8))
    rows = np.full(3, 4)
    costs = replace(COSTS, decode_row_key=5.0)
    assert Readers(costs, rows, TILE).alone(1024) == pytest.approx(1024 * (20 + 3 * 20))


def test_rows_that_fill_no_tile_are_no_reason_to_share():
    costs = replace(COSTS, tile_key=1000.0, decode_row_key=1000.0 / TILE, row=0.0)
    assert not any(Readers(costs, np.full(requests, 1), TILE).share(4096) for requests in (2, 6, 32, 256))


def test_order_of_requests_does_not_matter():
    rows = np.array([1, 90, 7, 30, 4])
    times = {float(Readers(COSTS, order, TILE).alone(1024)[0]) for order in (rows, rows[::-1], np.roll(rows, 2))}
    assert max(times) == pytest.approx(min(times))


def test_shared_reads_once_with_tiles_across_requests_and_pays_for_each_row():
    rows = np.full(32, 4)  # 128 rows: 22 tiles, 44 ns a key
    assert Readers(COSTS, rows, TILE).shared(1024) == pytest.approx(1024 * (20 + 44) + 128 * 100)


def test_long_part_of_many_requests_pays():
    assert Readers(COSTS, np.full(8, 4), TILE).share(1024)


def test_short_part_does_not_pay_for_its_rows():
    # From 128 tokens on reading would be worth it, were the states free.
    assert not Readers(COSTS, np.full(8, 4), TILE).share(128)
    assert Readers(replace(COSTS, row=0.0), np.full(8, 4), TILE).share(128)


def test_part_shorter_than_the_least_is_never_shared():
    costs = replace(COSTS, row=0.0)
    assert not Readers(costs, np.full(8, 4), TILE).share(127)


def test_one_request_shares_nothing():
    assert not Readers(replace(COSTS, margin=100.0), np.array([4]), TILE).share(1024)


def test_margin_is_kept():
    rows = np.full(8, 4)
    part = Readers(COSTS, rows, TILE).shared(1024) / Readers(COSTS, rows, TILE).alone(1024)
    assert Readers(replace(COSTS, margin=part * 1.01), rows, TILE).share(1024)
    assert not Readers(replace(COSTS, margin=part * 0.99), rows, TILE).share(1024)
