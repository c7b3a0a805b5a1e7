"""Heads over ranks."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse.head_shard import HeadShard
from dit_sparse.parallel.balance import balanced, contiguous, imbalance

COSTS = st.lists(st.floats(0, 1), min_size=4, max_size=9)


def test_contiguous_heads() -> None:
    assert contiguous(4, 2) == ((0, 1), (2, 3))
    assert contiguous(5, 3) == ((0, 1), (2, 3), (4,))
    with pytest.raises(ValueError, match="must be at most the model's 3 heads, got 4"):
        contiguous(3, 4)


@given(COSTS, st.integers(2, 4))
def test_balanced_is_no_worse_and_keeps_counts(costs: list[float], ranks: int) -> None:
    plain, spread = contiguous(len(costs), ranks), balanced(costs, ranks)
    assert sorted(head for part in spread for head in part) == list(range(len(costs)))
    assert [len(part) for part in spread] == [len(part) for part in plain]
    assert imbalance(costs, spread) <= imbalance(costs, plain) + 1e-9


@given(st.lists(st.floats(0.05, 1), min_size=4, max_size=8).filter(lambda c: len(c) % 2 == 0))
def test_two_ranks_come_near_the_best_there_is(costs: list[float]) -> None:
    half, whole = len(costs) // 2, sum(costs)
    best = min(max(sum(part), whole - sum(part)) for part in combinations(costs, half))
    got = max(sum(costs[head] for head in part) for part in balanced(costs, 2))
    assert got <= best * 7 / 6 + 1e-9


def test_half_of_the_heads_twice_as_dear() -> None:
    costs = [4.0, 4.0, 1.0, 1.0]
    assert imbalance(costs, contiguous(4, 2)) == 1.6
    assert imbalance(costs, balanced(costs, 2)) == 1.0
    assert imbalance([0.0] * 4, contiguous(4, 2)) == 1.0


@pytest.mark.parametrize("assignment", [((0, 1), (1, 2)), ((0, 2),), ((0, 1), ())])
def test_a_shard_has_every_head_once(assignment: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="every head to one rank and every rank a head"):
        HeadShard(assignment, 0, None)
