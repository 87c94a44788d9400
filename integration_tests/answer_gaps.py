"""How far the answers of two engines are apart."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

#: A token of an answer (whatever the engine calls it by), its log-probability, and the likeliest tokens' own.
Token = tuple[Any, float, dict[Any, float]]


def largest_gap(ours: Sequence[Sequence[Token]], theirs: Sequence[Sequence[Token]]) -> float:
    """How much less likely than its own choice the reference finds what we chose, where greedy answers part (nats).

    Up to there, how much the log-probabilities of the same tokens differ; whichever is more.
    """
    worst = 0.0
    for mine, its in zip(ours, theirs, strict=True):
        pairs = list(zip(mine, its, strict=True))
        same = list(takewhile(lambda pair: pair[0][0] == pair[1][0], pairs))
        worst = max([worst, *(abs(my[1] - other[1]) for my, other in same)])
        if len(same) < len(pairs):
            my, other = pairs[len(same)]
            worst = max(worst, other[1] - other[2].get(my[0], float("-inf")))
    return worst
