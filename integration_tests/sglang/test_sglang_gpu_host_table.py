"""Which requests share, known from copies of a device's block table that come in the background."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llmir.frontends.sglang.host_table import REFRESH_STEPS, ROOM, HostTable
from llmir.runtime.prefix_finder import PrefixFinder

BLOCK = 16


def lengths(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def device(*rows: Sequence[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def shared_blocks(table: np.ndarray, blocks: int) -> list[int]:
    """How many blocks each pair of neighbouring rows shares, as the work list will see it."""
    tree = PrefixFinder().find(table, np.full(len(table), blocks, np.int64))
    return tree.end.tolist()


@pytest.fixture
def known() -> HostTable:
    """A table of two requests that share two blocks, and one that shares none."""
    table = HostTable(BLOCK)
    table.follow(["a", "b", "c"], lengths(50, 40, 40), device([4, 5, 6, 7], [4, 5, 8, 0], [9, 3, 2, 0]))
    return table


def test_nothing_is_known_at_first() -> None:
    assert HostTable(BLOCK).of(["a", "b"], lengths(50, 50)) is None


def test_what_a_step_shared_is_known_in_the_next(known: HostTable) -> None:
    table = known.of(["a", "b", "c"], lengths(51, 41, 41))
    assert (table[0, :2] == table[1, :2]).all()
    assert shared_blocks(table, 3) == [2]


def test_requests_may_come_in_another_order_and_with_others(known: HostTable) -> None:
    table = known.of(["new", "b", "a"], lengths(64, 41, 51))
    assert (table[1, :2] == table[2, :2]).all()
    assert len({int(block) for block in table[:, 2]}) == 3
    assert table[0, 0] not in table[1:]


def test_blocks_that_were_not_whole_are_not_compared() -> None:
    table = HostTable(BLOCK)
    table.follow(["a", "b"], lengths(20, 20), device([4, 5], [4, 5]))
    assert shared_blocks(table.of(["a", "b"], lengths(40, 40)), 2) == [1]


def test_padding_shares_nothing(known: HostTable) -> None:
    table = known.of(["a", "b"], lengths(51, 41, 1, 1))
    assert len(table) == 4
    assert not set(table[2]) & set(table[3])


def test_growth_shares_nothing_and_mostly_keeps_the_table(known: HostTable) -> None:
    first = known.of(["a", "b"], lengths(51, 41))
    assert known.of(["a", "b"], lengths(51 + ROOM * BLOCK, 190)) is first
    assert known.of(["a", "b"], lengths(52 + (ROOM + 1) * BLOCK, 190)) is not first
    assert shared_blocks(first, 11) == [2]


def test_a_request_whose_prompt_is_processed_again_is_another(known: HostTable) -> None:
    known.forget(["b"])
    assert known.of(["a", "b"], lengths(51, 41)) is None


def test_nobody_is_known_after_a_prefill_of_unknown_requests(known: HostTable) -> None:
    known.forget(None)
    assert known.of(["a", "b", "c"], lengths(51, 41, 41)) is None


def test_requests_with_one_id_are_not_told_apart(known: HostTable) -> None:
    assert known.of(["a", "a"], lengths(51, 51)) is None


def test_rows_of_two_moments_are_never_compared(known: HostTable) -> None:
    known.of(["a", "b", "c"], lengths(51, 41, 41))
    known.forget(["b"])
    # Meanwhile the cache has given b's last block to a new request d, and b another one.
    known.follow(["a", "d"], lengths(52, 40), device([4, 5, 6, 7], [8, 1, 2, 0]))
    assert shared_blocks(known.of(["a", "b", "d"], lengths(53, 43, 41)), 2) == []


class TestCopies:
    """How often the device's table is copied, and that nothing waits for it."""

    @pytest.fixture
    def slow(self, known: HostTable) -> HostTable:
        """A copy that is under way when asked for."""
        known.of(["a", "b", "c"], lengths(51, 41, 41))
        known.follow(["a", "d"], lengths(52, 52), device([4, 5, 6, 7], [4, 5, 6, 8]))
        coming = known._coming
        self.arrived = False
        vars(known)["_coming"] = type(coming)(
            coming.row, coming.blocks, coming.table, SimpleNamespace(query=lambda: self.arrived)
        )
        return known

    def test_until_it_has_come_the_last_one_is_used(self, slow: HostTable) -> None:
        assert slow.of(["a", "d"], lengths(53, 53)) is None
        assert slow.of(["a", "b"], lengths(53, 53)) is not None
        self.arrived = True
        assert shared_blocks(slow.of(["a", "d"], lengths(54, 54)), 3) == [3]

    def test_no_other_is_begun_meanwhile(self, slow: HostTable) -> None:
        coming = slow._coming
        slow.follow(["a", "e"], lengths(53, 53), device([4], [4]))
        assert slow._coming is coming

    def test_a_prompt_that_is_processed_meanwhile_is_forgotten(self, slow: HostTable) -> None:
        slow.forget(["d"])
        self.arrived = True
        assert slow.of(["a", "d"], lengths(54, 54)) is None

    def test_the_same_requests_are_copied_again_only_now_and_then(self, known: HostTable) -> None:
        begun = 0
        for _ in range(2 * REFRESH_STEPS):
            known.of(["a", "b", "c"], lengths(51, 41, 41))
            known.follow(["a", "b"], lengths(51, 41), device([4, 5, 6, 7], [4, 5, 8, 0]))
            begun += known._coming is not None
        assert begun == 2

    def test_one_request_alone_is_never_copied(self) -> None:
        table = HostTable(BLOCK)
        table.follow(["a"], lengths(50), device([4, 5, 6, 7]))
        assert table._coming is None

    def test_what_the_device_does_later_changes_no_copy(self) -> None:
        table, on_device = HostTable(BLOCK), device([4, 5, 6], [4, 5, 7])
        table.follow(["a", "b"], lengths(48, 48), on_device)
        on_device.fill_(0)
        assert shared_blocks(table.of(["a", "b"], lengths(49, 49)), 3) == [2]
