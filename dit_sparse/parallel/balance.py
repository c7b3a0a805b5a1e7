"""Which rank attends with which heads: those of unequal density are spread so that ranks have equally much to do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

__all__ = ["balanced", "contiguous", "imbalance"]

Assignment = tuple[tuple[int, ...], ...]


def contiguous(heads: int, ranks: int) -> Assignment:
    """The heads in their order; where they do not divide, the first ranks have one more.

    Raises:
        ValueError: more ranks than heads.
    """
    if ranks > heads:
        raise ValueError(f"ranks that share heads must be at most the model's {heads} heads, got {ranks}")
    each, more = divmod(heads, ranks)
    bounds = [rank * each + min(rank, more) for rank in range(ranks + 1)]
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(bounds))


def balanced(costs: Sequence[float], ranks: int) -> Assignment:
    """The heads so that the largest sum of `costs` on a rank is small, every rank having as many heads as `contiguous`.

    The heads, dearest first, go each to the rank with the smallest sum among those with room (longest processing time
    first, Graham 1969, with a limit of heads a rank); then pairs are swapped while that lowers the largest sum. The
    same on every rank. Equal counts keep what a rank sends, receives and stores what it was.
    """
    sizes = [len(own) for own in contiguous(len(costs), ranks)]
    parts: list[list[int]] = [[] for _ in sizes]
    for head in sorted(range(len(costs)), key=lambda h: (-costs[h], h)):
        open_ranks = [r for r, size in enumerate(sizes) if len(parts[r]) < size]
        parts[min(open_ranks, key=lambda r: (sum(costs[h] for h in parts[r]), r))].append(head)
    while _swap(parts, costs):
        pass
    spread = tuple(tuple(sorted(part)) for part in parts)
    return min(spread, contiguous(len(costs), ranks), key=lambda assignment: imbalance(costs, assignment))


def _swap(parts: list[list[int]], costs: Sequence[float]) -> bool:
    """Swap one head of the dearest rank for one of another, if that makes the dearer of the two cheaper."""
    sums = [sum(costs[head] for head in part) for part in parts]
    worst = max(range(len(parts)), key=lambda r: sums[r])
    best: tuple[float, tuple[int, int, int] | None] = (sums[worst] * (1 - 1e-9), None)
    for other in range(len(parts)):
        for i, mine in enumerate(parts[worst]):
            for j, theirs in enumerate(parts[other]):
                moved = costs[mine] - costs[theirs]
                dearer = max(sums[worst] - moved, sums[other] + moved)
                if other != worst and dearer < best[0]:
                    best = (dearer, (other, i, j))
    if best[1] is None:
        return False
    other, i, j = best[1]
    parts[worst][i], parts[other][j] = parts[other][j], parts[worst][i]
    return True


def imbalance(costs: Sequence[float], assignment: Assignment) -> float:
    """The largest sum of `costs` on a rank over the mean: 1 where all ranks are done at the same time."""
    sums = [sum(costs[head] for head in part) for part in assignment]
    mean = sum(sums) / len(sums)
    return max(sums) / mean if mean > 0 else 1.0
