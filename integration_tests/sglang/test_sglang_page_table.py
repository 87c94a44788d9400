"""The pages of requests on a CPU, kept up with what SGLang writes: at any time as if all were read anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

from llmir.errors import LlmirError
from llmir.frontends.sglang.page_table import PageTable

REQUESTS, TOKENS = 5, 64
PAGES = [1, 4, 16]


class Served:
    """SGLang's table, and llmir's that follows it."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self.pool = ReqToTokenPool(REQUESTS, TOKENS, "cpu", enable_memory_saver=False)
        self.table = PageTable(self.pool, page_size)
        self._next_page = 1
        self.length = [0] * (REQUESTS + 1)
        self.before: dict[int, list[int]] = {}

    def slots(self, row: int, begin: int, end: int) -> torch.Tensor:
        """Of new tokens: in the page that the row has begun, then in new ones."""
        found = []
        for token in range(begin, end):
            if token % self.page_size:
                found.append((found[-1] if found else int(self.pool.req_to_token[row, token - 1])) + 1)
            else:
                found.append(self._next_page * self.page_size)
                self._next_page += 1
        return torch.tensor(found, dtype=torch.int32)

    def prefill(self, row: int, like: int, prefix: int, end: int) -> None:
        """A new request in ``row`` that begins as another does, as SGLang writes it."""
        self.pool.write((row, slice(0, prefix)), self.pool.req_to_token[like, :prefix].clone())
        self.pool.write((row, slice(prefix, end)), self.slots(row, prefix, end))
        self.length[row] = end

    def decode(self, rows: list[int]) -> None:
        places = torch.tensor([self.length[row] for row in rows])
        values = torch.cat([self.slots(row, self.length[row], self.length[row] + 1) for row in rows])
        self.pool.write((torch.tensor(rows), places), values)
        for row in rows:
            self.length[row] += 1

    def check(self, rows: list[int]) -> None:
        """A step of ``rows``: its pages are right, and no row says that it is as before where it is not."""
        lengths = np.array([self.length[row] for row in rows], np.int32)
        unchanged = self.table.update(np.array(rows, np.int64), lengths)
        for row, length in zip(rows, lengths.tolist(), strict=True):
            expected = (self.pool.req_to_token[row, : length : self.page_size] // self.page_size).tolist()
            found = self.table.pages[row, : len(expected)].tolist()
            assert found == expected
        now = {row: self.pool.req_to_token[row].tolist() for row in range(REQUESTS + 1)}
        for row, slots in now.items():
            same = int(unchanged[row]) * self.page_size
            assert not self.before or slots[:same] == self.before[row][:same]
        self.before = now


@given(st.data(), st.sampled_from(PAGES))
def test_after_any_steps_the_pages_are_those_of_the_tokens(data: st.DataObject, page_size: int) -> None:
    served = Served(page_size)
    rows = st.integers(1, REQUESTS)
    for _ in range(data.draw(st.integers(1, 8))):
        match data.draw(st.sampled_from(["prefill", "decode", "decode", "rewrite", "past"])):
            case "prefill":
                row, like = data.draw(rows), data.draw(rows)
                prefix = data.draw(st.integers(0, served.length[like] // page_size)) * page_size if like != row else 0
                served.prefill(row, like, prefix, prefix + data.draw(st.integers(1, 20 if prefix < 40 else 5)))
            case "decode":
                full = [row for row in range(1, REQUESTS + 1) if 0 < served.length[row] < TOKENS]
                if full:
                    served.decode(data.draw(st.lists(st.sampled_from(full), min_size=1, unique=True)))
            case "rewrite":  # as the prefix cache does, when it has the same tokens already
                row, like = data.draw(rows), data.draw(rows)
                whole = min(served.length[row], served.length[like]) // page_size * page_size
                begin = data.draw(st.integers(0, whole // page_size)) * page_size
                served.pool.write((row, slice(begin, whole)), served.pool.req_to_token[like, begin:whole].clone())
            case _:  # past SGLang's own function
                row, like = data.draw(rows), data.draw(rows)
                whole = min(served.length[row], served.length[like]) // page_size * page_size
                served.pool.req_to_token[row, :whole] = served.pool.req_to_token[like, :whole].clone()
        served.check(data.draw(st.lists(rows, min_size=1, unique=True)))


@pytest.mark.parametrize("page_size", PAGES)
def test_a_step_reads_only_what_is_new(page_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Served(page_size)
    for row in (1, 2):
        served.prefill(row, row, 0, 33)
    served.check([1, 2])
    served.decode([1, 2])
    unchanged = served.table.update(np.array([1, 2]), np.array([34, 34], np.int32))
    assert unchanged[1:3].tolist() == [33 // page_size] * 2
    assert (unchanged[3:] * page_size >= TOKENS).all()


def test_another_tensor_than_at_first_is_an_error() -> None:
    served = Served(4)
    served.prefill(1, 1, 0, 9)
    served.pool.req_to_token = served.pool.req_to_token.clone()
    with pytest.raises(LlmirError, match="another req_to_token"):
        served.table.update(np.array([1]), np.array([9], np.int32))


def test_other_ways_to_say_where_are_taken_for_everywhere() -> None:
    served = Served(4)
    for row in (1, 2):
        served.prefill(row, row, 0, 33)
    served.check([1, 2])
    mask, byte_mask = torch.tensor([True] * TOKENS), torch.tensor([0, 0, 1, 1, 0, 0], dtype=torch.uint8)
    rows, columns = torch.tensor([[1], [2]]), torch.tensor([[0, 1, 2]])
    places = (slice(1, 2), slice(0, 8)), (1, slice(-60, -56)), (1, mask), (byte_mask, slice(0, 4)), (rows, columns)
    for where in (1, torch.tensor([1]), *places):
        served.pool.write(where, served.pool.req_to_token[where].clone())
        assert served.table.update(np.array([1]), np.array([33], np.int32)).tolist() == [0] * (REQUESTS + 1)
