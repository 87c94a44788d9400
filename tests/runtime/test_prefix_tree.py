"""Trees of shared blocks against the sentence that defines them, in steps of any kind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmir.runtime.prefix_finder import PrefixFinder
from llmir.runtime.prefix_tree import PrefixTree

BLOCK_BYTES = 4
#: (requests, begin, end) of a node; its parent's requests and end, or none.
Node = tuple[frozenset[int], int, int]
Edge = tuple[Node, Node | None]


class Step:
    """A block table and how many of each row's blocks count: the rest is garbage."""

    def __init__(self, rows: list[list[int]], garbage: list[list[int]], spare: int = 0):
        """``garbage``: what follows each row, as far as the table is wide; ``spare``: columns nobody has blocks for."""
        width = max(map(len, rows), default=0) + spare
        self.table = np.full((len(rows), width), -1, np.int32)
        self.blocks = np.array([len(row) for row in rows], np.int64)
        for place, (row, rest) in enumerate(zip(rows, garbage, strict=True)):
            entries = [*row, *rest][:width]
            self.table[place, : len(entries)] = entries

    def permuted(self, order: list[int]) -> Step:
        step = Step([], [])
        step.table, step.blocks = self.table[order], self.blocks[order]
        return step

    def __repr__(self) -> str:
        return f"Step({self.table.tolist()}, {self.blocks.tolist()})"


def edges_by_definition(step: Step) -> set[Edge]:
    """Every set of two or more requests that are all those to begin with some blocks, up to where they part."""
    rows = [row[:count].tobytes() for row, count in zip(step.table, step.blocks, strict=True)]
    sharing: dict[frozenset[int], int] = {}
    for prefix in {row[:end] for row in rows for end in range(BLOCK_BYTES, len(row) + 1, BLOCK_BYTES)}:
        requests = frozenset(i for i, row in enumerate(rows) if row.startswith(prefix))
        if len(requests) > 1:
            sharing[requests] = max(len(prefix) // BLOCK_BYTES, sharing.get(requests, 0))
    edges: set[Edge] = set()
    above: dict[frozenset[int], Node] = {}
    for requests, end in sorted(sharing.items(), key=lambda node: -len(node[0])):
        parent = min((node for node in above.values() if requests < node[0]), key=lambda n: len(n[0]), default=None)
        above[requests] = (requests, parent[2] if parent else 0, end)
        edges.add((above[requests], parent))
    return edges


def nodes_of(tree: PrefixTree) -> list[Node]:
    begin = np.where(tree.parent >= 0, tree.end[tree.parent], 0).tolist() if len(tree.end) else []
    columns = zip(tree.first.tolist(), tree.last.tolist(), begin, tree.end.tolist(), strict=True)
    return [(frozenset(tree.order[first:last].tolist()), begin, end) for first, last, begin, end in columns]


def edges_of(tree: PrefixTree) -> set[Edge]:
    nodes = nodes_of(tree)
    edges = [(node, nodes[up] if up >= 0 else None) for node, up in zip(nodes, tree.parent.tolist(), strict=True)]
    assert len(set(edges)) == len(edges)
    return set(edges)


def same_structure(one: PrefixTree, other: PrefixTree) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in PrefixTree.__dataclass_fields__)


#: Few numbers, so that rows share blocks, repeat them and look like others' garbage; among them the largest.
numbers = st.sampled_from([0, 1, 2, 2**31 - 1])
garbage_numbers = numbers | st.just(-1)
short_rows = st.lists(numbers, max_size=7)


@st.composite
def trees_of_rows(draw: st.DrawFn) -> list[list[int]]:
    """Rows that mostly continue the beginning of an earlier one."""
    rows: list[list[int]] = []
    for _ in range(draw(st.integers(0, 12))):
        earlier = draw(st.sampled_from(rows)) if rows else []
        rows.append(earlier[: draw(st.integers(0, len(earlier)))] + draw(short_rows))
    return rows


@st.composite
def long_rows(draw: st.DrawFn) -> list[list[int]]:
    """Rows that go on after much of one long beginning, or end there."""
    beginning = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 999, 300).tolist()
    return [beginning[: draw(st.integers(0, 300))] + draw(short_rows) for _ in range(draw(st.integers(2, 6)))]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    rows = draw(trees_of_rows() | long_rows())
    garbage = [draw(st.lists(garbage_numbers, max_size=6)) for _ in rows]
    return Step(rows, garbage, draw(st.integers(0, 3)))


@given(steps())
@example(Step([], []))
@example(Step([[]], [[]]))
@example(Step([[], []], [[], []]))
@example(Step([[1, 2]], [[]]))
@example(Step([[], []], [[5], [5]], spare=1))
@example(Step([[1, 2], [1, 2], [1, 2]], [[], [], []]))
@example(Step([[1], [1, 2, 3], [1, 2]], [[2, 3], [], [3]]))
def test_tree_is_what_the_definition_says(step):
    assert edges_of(PrefixFinder().find(step.table, step.blocks)) == edges_by_definition(step)


@given(steps())
def test_invariants(step):
    tree = PrefixFinder().find(step.table, step.blocks)
    assert sorted(tree.order.tolist()) == list(range(len(step.blocks)))
    assert (tree.last - tree.first >= 2).all()
    assert (tree.end > 0).all()
    depth_first = list(zip(tree.first.tolist(), (-tree.last).tolist(), strict=True))
    assert depth_first == sorted(set(depth_first))
    for number, parent in enumerate(tree.parent.tolist()):
        assert parent < number
        assert parent < 0 or tree.end[parent] < tree.end[number]
        assert parent < 0 or (tree.first[parent] <= tree.first[number] and tree.last[number] <= tree.last[parent])
    for field in PrefixTree.__dataclass_fields__:
        assert getattr(tree, field).dtype == np.int64


@given(st.data(), steps())
def test_permuted_requests_permute_the_tree(data, step):
    order = data.draw(st.permutations(range(len(step.blocks))))
    permuted = step.permuted(order)
    tree = PrefixFinder().find(permuted.table, permuted.blocks)
    original = {
        tuple((frozenset(order[i] for i in node[0]), *node[1:]) if node else None for node in edge)
        for edge in edges_of(tree)
    }
    assert original == edges_of(PrefixFinder().find(step.table, step.blocks))


@given(st.data(), steps())
def test_what_follows_the_counted_blocks_is_not_looked_at(data, step):
    tree = PrefixFinder().find(step.table, step.blocks)
    other = step.table.copy()
    for row, count in zip(other, step.blocks, strict=True):
        rest = len(row) - int(count)
        row[count:] = data.draw(st.lists(garbage_numbers, min_size=rest, max_size=rest)) if rest < 9 else -1
    assert edges_of(PrefixFinder().find(other, step.blocks)) == edges_of(tree)


@given(steps(), st.integers(0, 3), st.integers(1, 3))
def test_rows_may_lie_apart(step, spare_columns, row_step):
    height, width = step.table.shape
    memory = np.full((height * row_step, width + spare_columns), 7, np.int32)
    memory[::row_step, :width] = step.table
    table = memory[::row_step, :width]
    assert same_structure(PrefixFinder().find(table, step.blocks), PrefixFinder().find(step.table.copy(), step.blocks))


@st.composite
def served_steps(draw: st.DrawFn) -> list[Step]:
    """Steps of serving: requests come, grow, are cut short, change places and go, in one table that stays."""
    rows, result = draw(trees_of_rows()), []
    for _ in range(draw(st.integers(1, 6))):
        for change in draw(st.lists(st.sampled_from(["grow", "cut", "come", "go", "permute", "replace"]), max_size=3)):
            place = draw(st.integers(0, len(rows) - 1)) if rows else None
            if change == "come":
                rows = [*rows, (rows[place] if rows else []) + draw(short_rows)]
            elif change == "permute":
                rows = draw(st.permutations(rows))
            elif place is None:
                continue
            elif change == "go":
                rows = rows[:place] + rows[place + 1 :]
            elif change == "grow":
                rows = [[*row, draw(numbers)] if draw(st.booleans()) else row for row in rows]
            elif change == "cut":
                rows = [*rows[:place], rows[place][: draw(st.integers(0, 3))], *rows[place + 1 :]]
            else:
                rows = [*rows[:place], draw(short_rows), *rows[place + 1 :]]
        garbage = [draw(st.lists(garbage_numbers, max_size=3)) for _ in rows]
        result.append(Step(rows, garbage, draw(st.integers(0, 2))))
    return result


@given(served_steps())
def test_finder_that_saw_other_steps_finds_the_same(served):
    finder, height, width = PrefixFinder(), 40, max(step.table.shape[1] for step in served)
    memory = np.zeros((height, width), np.int32)
    for step in served:
        table = memory[: len(step.blocks), : step.table.shape[1]]
        table[:] = step.table
        assert edges_of(finder.find(table, step.blocks)) == edges_by_definition(step)


@given(st.data(), steps())
def test_counts_may_change_while_the_table_stays(data, step):
    finder, rows = PrefixFinder(), [row[:count] for row, count in zip(step.table, step.blocks.tolist(), strict=True)]
    for _ in range(3):
        step.blocks = np.array([data.draw(st.integers(0, len(row))) for row in rows], np.int64)
        assert edges_of(finder.find(step.table, step.blocks)) == edges_by_definition(step)


@given(served_steps())
def test_same_object_stands_for_the_same_tree(served):
    finder, last, last_edges, last_order = PrefixFinder(), None, None, None
    for step in served:
        tree = finder.find(step.table, step.blocks)
        if tree is last:
            assert edges_of(tree) == last_edges
            assert tree.order.tolist() == last_order
        last, last_edges, last_order = tree, edges_of(tree), tree.order.tolist()


@pytest.mark.parametrize(
    ("rows", "then"),
    [
        ([[1, 2, 3], [1, 2, 4], [5]], [[1, 2, 3, 6], [1, 2, 4, 7], [5, 8]]),
        ([[1, 2, 3], [1, 2, 4], [5]], [[1, 2, 3], [1, 2, 9], [6, 5]]),
        ([[1, 2], [1, 2, 4]], [[1, 2, 3], [1, 2, 4]]),
        ([[1], [2], []], [[1, 3], [2, 3], [4]]),
        ([], []),
    ],
)
def test_step_of_the_same_structure_gives_the_same_object(rows, then):
    finder, (before, after) = PrefixFinder(), (Step(r, [[]] * len(r), spare=4) for r in (rows, then))
    assert finder.find(before.table, before.blocks) is finder.find(after.table, after.blocks)


@pytest.mark.parametrize(
    "then",
    [
        [[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 5]],  # two go on alike
        [[1, 2], [1, 2, 3], [1, 2, 5]],  # one is cut to what all share
        [[1, 2, 3], [1, 9, 3], [1, 2, 5]],  # one leaves earlier
        [[1, 2, 3], [1, 2, 5], [1, 2, 5]],  # one changes sides
        [[1, 2, 3], [1, 2, 3]],
        [[1, 2, 3], [1, 2, 3], [1, 2, 5], []],
    ],
)
def test_step_of_another_structure_gives_another_object(then):
    finder, before = PrefixFinder(), Step([[1, 2, 3], [1, 2, 3], [1, 2, 5]], [[]] * 3, spare=2)
    tree = finder.find(before.table, before.blocks)
    after = Step(then, [[]] * len(then), spare=2)
    assert finder.find(after.table, after.blocks) is not tree


def test_garbage_like_a_shared_block_changes_nothing():
    finder = PrefixFinder()
    trees = [
        finder.find(step.table, step.blocks)
        for step in (Step([[1, 2], [1, 2, 4], [1, 2, 5]], [rest, [], []]) for rest in ([], [4], [5]))
    ]
    assert trees[0] is trees[1] is trees[2]


def test_fewer_counted_blocks_of_the_same_table_are_seen():
    finder, table = PrefixFinder(), np.array([[1, 2, 3]] * 3, np.int32)
    finder.find(table, np.array([3, 3, 3]))
    step = Step([[1, 2, 3], [1, 2, 3], [1, 2]], [[], [], [3]])
    assert edges_of(finder.find(step.table, step.blocks)) == edges_by_definition(step)


def test_two_that_were_apart_meet_when_one_grows():
    """In the order found first, the shorter one's neighbour need not be the one it then shares more with."""
    finder = PrefixFinder()
    for third in (3, 4):
        rows = [[1, 2], [1, 2, 3, 5], [1, 2, 4, 6]]
        before = Step(rows, [[], [], []])
        after = Step([[1, 2, third], *rows[1:]], [[], [], []])
        finder.find(before.table, before.blocks)
        assert edges_of(finder.find(after.table, after.blocks)) == edges_by_definition(after)
