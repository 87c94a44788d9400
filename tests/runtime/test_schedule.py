"""The work lists of steps: every key that a token may see is read for it exactly once, whatever is shared."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import changed

from llmir.errors import KernelError
from llmir.ir.attention_spec import AttentionSpec
from llmir.ir.kernel_spec import CpuVariant, KernelSpec, SharingCosts, StepPolicy
from llmir.kernels.work_list import Item
from llmir.runtime.schedule import Schedule, Scheduler
from llmir.runtime.split import ByLaunch, ByThread
from llmir.runtime.step import Step

SIGNATURE = AttentionSpec.dense(6, 2, 64, "bf16", 16, 0.125, layout="pair")
VARIANTS = (CpuVariant("decode", 1, 3, 32, 2, 4, 32), CpuVariant("prefill", 8, 6, 32, 2, 4, 0))
#: Whatever two requests have in common is read once.
COSTS = SharingCosts(
    most_rows=12,
    least_tokens=1,
    read_key=2.0,
    cached_key=((1, 2.0),),
    tile_key=1.0,
    decode_rows=1000,
    decode_row_key=1.0,
    row=0.0,
    margin=1e9,
)
POLICY = StepPolicy(decode_tokens=1, split_keys=32, items_per_thread=2, sharing=COSTS)


def scheduler(window: int = 0, policy: StepPolicy = POLICY) -> Scheduler:
    return Scheduler(KernelSpec(changed(SIGNATURE, window=window), "avx512_bf16", VARIANTS), policy)


class Case:
    """Requests by their cached and new tokens, and of each an earlier one with which it begins for so many blocks."""

    def __init__(self, requests: list[tuple[int, int, int, int]]):
        self.cached = np.array([cached for cached, *_ in requests])
        self.new = np.array([new for _, new, *_ in requests])
        self.lengths = (self.cached + self.new).astype(np.int32)
        self.query_start = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        columns = int(self.lengths.max()) // 16 + 1
        self.table = np.arange(len(requests) * columns, dtype=np.int32).reshape(len(requests), columns)
        for request, (cached, _, other, blocks) in enumerate(requests):
            other %= request + 1
            shared = min(blocks, cached // 16, int(self.cached[other]) // 16)
            self.table[request, :shared] = self.table[other, :shared]

    def schedule(self, scheduler: Scheduler, threads: int | tuple[int, int] = 1):
        """``threads``: of a CPU, or on a GPU the thread blocks of each variant."""
        by = ByThread(threads) if isinstance(threads, int) else ByLaunch(threads, prefill=1)
        return scheduler.schedule(Step(self.query_start, self.lengths, self.table), by)


def keys_of(item, i: int, window: int) -> range:
    """The keys of an item that its token ``i`` sees: gathered tokens see all of them, but for one window for all."""
    limit = item[Item.POSITION] + 1 + (i if item[Item.MEMBERS] < 0 else 0)
    begin = max(item[Item.KEY_BEGIN], limit - window) if window else item[Item.KEY_BEGIN]
    return range(begin, min(item[Item.KEY_END], limit))


def tokens_of(item, merges) -> list[int]:
    members = item[Item.MEMBERS]
    if members < 0:
        return list(range(item[Item.TOKEN], item[Item.TOKEN] + item[Item.TOKENS]))
    return merges.tokens[merges.members[members : members + item[Item.TOKENS]]].tolist()


requests = st.tuples(
    st.integers(0, 200), st.sampled_from([0, 1, 1, 1, 2, 4, 30]), st.integers(0, 9), st.integers(0, 12)
)
steps = st.builds(Case, st.lists(requests, min_size=1, max_size=9).filter(lambda r: any(new for _, new, *_ in r)))


def check_keys(step: Case, window: int, threads: int | tuple[int, int] = 1) -> Schedule:
    """Every token reads each key that it sees once, and no other; gives the work list."""
    found = step.schedule(scheduler(window), threads)
    owner = np.repeat(np.arange(len(step.new)), step.new)
    read: dict[int, Counter] = {token: Counter() for token in range(len(owner))}
    for item in found.items:
        for i, token in enumerate(tokens_of(item, found.merges)):
            request, other = owner[token], item[Item.REQUEST]
            keys = keys_of(item, i, window)
            blocks = [key // 16 for key in range(item[Item.KEY_BEGIN], item[Item.KEY_END])]
            assert (step.table[request, blocks] == step.table[other, blocks]).all()
            read[token].update(keys)
            if request != other or item[Item.MEMBERS] >= 0:
                assert item[Item.KEY_END] <= step.cached[request]
    for token, counts in read.items():
        request = owner[token]
        position = step.cached[request] + token - step.query_start[request]
        first = max(0, position - window + 1) if window else 0
        assert counts == Counter(range(first, position + 1))
    return found


@settings(deadline=None)
@given(step=steps, window=st.sampled_from([0, 0, 20, 100]), threads=st.sampled_from([1, 2, 5, (2, 1), (9, 4)]))
def test_every_key_a_token_sees_is_read_for_it_once(step, window, threads):
    check_keys(step, window, threads)


@pytest.mark.parametrize("window", range(80, 97))
def test_a_part_begins_where_the_last_of_a_requests_tokens_sees_it(window):
    found = check_keys(Case([(200, 4, 0, 0), (197, 1, 0, 12), (193, 2, 0, 12)]), window)
    assert found.shared_requests == 3


@settings(deadline=None)
@given(step=steps, threads=st.sampled_from([1, 2, 5, (2, 1), (9, 4)]))
def test_every_state_left_is_merged_once(step, threads):
    found = step.schedule(scheduler(), threads)
    merges = found.merges
    rows = set()
    sources = Counter()
    for item in found.items:
        if item[Item.STATE] < 0:
            continue
        tile = VARIANTS[item[Item.VARIANT]].row_tile
        own = range(item[Item.STATE], item[Item.STATE] + -(-item[Item.TOKENS] * 3 // tile) * tile)
        assert rows.isdisjoint(own) and own.stop <= merges.state_rows
        rows.update(own)
        for i, token in enumerate(tokens_of(item, merges)):
            merge = item[Item.MERGE] + i if item[Item.MEMBERS] < 0 else merges.members[item[Item.MEMBERS] + i]
            assert merges.tokens[merge] == token
            sources[int(merge), int(item[Item.STATE]) + 3 * i] += 1
    listed = Counter(
        (merge, int(source))
        for merge in range(merges.count)
        for source in merges.sources[merges.begin[merge] : merges.begin[merge + 1]]
    )
    assert sources == listed
    assert all(merges.begin[merge + 1] - merges.begin[merge] >= 2 for merge in range(merges.count))


def test_a_common_prefix_is_one_item():
    step = Case([(64, 1, 0, 0), (70, 1, 0, 4), (90, 1, 0, 4)])
    found = step.schedule(scheduler())
    once = found.items[found.items[:, Item.MEMBERS] >= 0]
    assert [tuple(item) for item in once[:, [Item.KV_HEAD, Item.KEY_BEGIN, Item.KEY_END, Item.TOKENS]]] == [
        (0, 0, 64, 3)
    ]
    assert (found.shared_requests, found.keys_not_read) == (3, 2 * 64)


def test_more_tokens_than_a_tile_holds_are_dealt_evenly():
    found = Case([(64, 1, 0, 4)] * 9).schedule(scheduler())
    once = found.items[found.items[:, Item.MEMBERS] >= 0]
    assert sorted(once[:, Item.TOKENS]) == [4, 5]
    assert found.keys_not_read == 7 * 64


def test_a_shared_part_is_split_for_several_threads():
    found = Case([(3200, 1, 0, 200)] * 4).schedule(scheduler(), threads=2)
    once = found.items[found.items[:, Item.MEMBERS] >= 0]
    assert len(once) > 1 and {item[Item.KEY_END] % 32 for item in once} == {0}


def pieces(step: Case, threads: int | tuple[int, int]) -> dict[int, list[int]]:
    """Of each variant: keys of every item."""
    items = step.schedule(scheduler(policy=replace(POLICY, sharing=None)), threads).items
    keys = items[:, Item.KEY_END] - items[:, Item.KEY_BEGIN]
    return {variant: keys[items[:, Item.VARIANT] == variant].tolist() for variant in (0, 1)}


PROMPT = (0, 40 * VARIANTS[1].max_tokens, 0, 0)


def test_a_prompt_of_many_tiles_stays_whole_in_a_launch_of_its_own():
    whole = len(pieces(Case([PROMPT]), 1)[1])
    assert len(pieces(Case([PROMPT]), (4, 4))[1]) == whole == 40
    assert len(pieces(Case([PROMPT]), (4, 400))[1]) > whole


def test_a_long_prompt_among_short_ones_is_split_in_a_launch_of_its_own():
    long, short = (4000, VARIANTS[1].max_tokens, 0, 0), (0, VARIANTS[1].max_tokens, 0, 0)
    assert len(pieces(Case([long] + [short] * 9), (4, 4))[1]) > 10


def test_as_many_pieces_of_prefill_as_are_done_in_whole_rounds():
    # Five tiles of two KV heads for sixteen thread blocks, two items each: 32 / 10 pieces a tile, rounded down.
    tiles = Case([(3000, VARIANTS[1].max_tokens, 0, 0)] * 5)
    assert len(pieces(tiles, (1, 16))[1]) == 5 * 3


def test_a_tile_of_nearly_two_parts_of_prefill_is_split():
    tiles = Case([(3000, VARIANTS[1].max_tokens, 0, 0)] * 9)  # 18 items for 17 thread blocks: 34 parts
    assert len(pieces(tiles, (1, 17))[1]) == 9 * 2


def test_a_launch_is_cut_by_its_own_work_alone():
    decode = [(900, 1, 0, 0)] * 3
    alone, beside = (pieces(Case(requests), (8, 4))[0] for requests in (decode, [*decode, PROMPT]))
    assert alone == beside and len(alone) > 3
    assert len(pieces(Case([*decode, PROMPT]), 8)[0]) == 3


@pytest.mark.parametrize("sharing", [None, replace(COSTS, margin=0.0), replace(COSTS, least_tokens=65)])
def test_what_does_not_pay_is_not_shared(sharing):
    found = Case([(64, 1, 0, 4)] * 4).schedule(scheduler(policy=replace(POLICY, sharing=sharing)))
    assert (found.shared_requests, found.keys_not_read, found.merges.count) == (0, 0, 0)
    assert len(found.items) == 4


def test_a_request_with_many_new_tokens_reads_alone():
    found = Case([(64, 5, 0, 4), (64, 1, 0, 4), (64, 4, 0, 4)]).schedule(scheduler())
    once = found.items[found.items[:, Item.MEMBERS] >= 0]
    assert [tokens_of(item, found.merges) for item in once] == [[5, 6, 7, 8, 9]]


def test_what_is_written_in_this_step_is_shared_by_nobody():
    step = Case([(64, 16, 0, 0), (80, 1, 0, 0)])
    step.table[1, :5] = step.table[0, :5]  # as if a block being written had two owners
    found = step.schedule(scheduler(policy=replace(POLICY, sharing=replace(COSTS, most_rows=100))))
    assert max(item[Item.KEY_END] for item in found.items if item[Item.MEMBERS] >= 0) == 64


def test_a_level_that_does_not_pay_is_read_with_the_next():
    dear = replace(COSTS, decode_row_key=0.1, row=40.0, margin=1.0)  # 40 ns a state: many tokens must be saved
    step = Case([(320, 1, 0, 0), (320, 1, 0, 20), (320, 1, 0, 1), (320, 1, 2, 20)])
    found = step.schedule(scheduler(policy=replace(POLICY, sharing=dear)))
    once = found.items[found.items[:, Item.MEMBERS] >= 0]
    assert {(item[Item.KEY_BEGIN], item[Item.KEY_END]) for item in once} == {(0, 320)} and len(once) == 2


def test_without_a_block_table_nothing_is_shared():
    requests = Case([(64, 1, 0, 4)] * 4)
    found = scheduler().schedule(Step(requests.query_start, requests.lengths), ByThread(2))
    assert (found.shared_requests, found.keys_not_read) == (0, 0)


def test_what_a_step_of_one_request_says_has_changed_counts_in_the_next():
    table = np.arange(40, dtype=np.int32).reshape(4, 10)
    table[1:3, :5] = table[0, :5]
    unchanged = np.full(4, 10)

    def shared_by(made: Scheduler, rows: list[int], unchanged: np.ndarray) -> int:
        lengths = np.full(len(rows), 100, np.int32)
        step = Step(np.arange(len(rows) + 1, dtype=np.int32), lengths, table, np.array(rows), unchanged)
        return made.schedule(step, ByThread(1)).shared_requests

    made = scheduler()
    assert shared_by(made, [0, 1, 2, 3], np.zeros(4, np.int64)) == 3
    table[1] += 100
    assert shared_by(made, [1], np.array([10, 0, 10, 10])) == 0
    assert shared_by(made, [0, 1, 2, 3], unchanged) == 2


def test_rows_without_a_table_are_refused():
    with pytest.raises(KernelError, match="has no table"):
        Step(np.arange(2, dtype=np.int32), np.ones(1, np.int32), unchanged=np.zeros(4, np.int64))


def test_costs_beyond_all_numbers_leave_a_list_of_all_items():
    sharing = replace(COSTS, read_key=1e12, tile_key=1e-12)
    step = Case([(64, 1, 0, 0), (640, 1, 0, 0), (6400, 1, 0, 0)])
    items = step.schedule(scheduler(policy=replace(POLICY, sharing=sharing))).items
    assert sorted(items[:, Item.REQUEST].tolist()) == [0, 1, 2]


def test_decisions_are_kept_while_the_tree_is_the_same(monkeypatch):
    from llmir.runtime import schedule

    calls = []
    decide = schedule.shared_parts
    monkeypatch.setattr(schedule, "shared_parts", lambda *args: calls.append(args) or decide(*args))
    same = scheduler()
    for step in range(4):
        Case([(64 + step, 1, 0, 4), (70 + step, 1, 0, 4)]).schedule(same)
    assert len(calls) == 1
    Case([(64, 1, 0, 4), (70, 2, 0, 4)]).schedule(same)
    assert len(calls) == 2
