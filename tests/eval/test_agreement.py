"""How far a cached search agrees with a full one, against a literal count of blocks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import AdaSpa, Neighborhood, Schedule, Site, TokenGrid
from dit_sparse.eval.agreement import SearchAgreement

GRID = TokenGrid(2, 8, 8)
BLOCK, HEADS, STEPS = 16, 2, 5
M = GRID.num_tokens // BLOCK
SCHEDULE = Schedule(AdaSpa(density=0.25, block=BLOCK, head_adaptive=False), warmup=0.2)  # searches at 1 and 3


def random_call(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`q, k, lse` of one call."""
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(1, HEADS, GRID.num_tokens, 8, generator=generator) for _ in range(2))
    return q, k, (q @ k.transpose(-1, -2) / math.sqrt(8)).logsumexp(-1)


def literal_blocks(q: Tensor, k: Tensor, lse: Tensor, rows: range) -> tuple[list[set[tuple[int, int]]], Tensor]:
    """The quarter of the blocks of largest mass in every row of blocks, for each head, and the masses `[H, M, M]`."""
    weights = (q[0].double() @ k[0].double().mT / math.sqrt(8) - lse[0, :, :, None].double()).exp()
    mass = torch.zeros(HEADS, M, M, dtype=torch.float64)
    for a in range(M):
        for b in range(M):
            part = weights[:, a * BLOCK : (a + 1) * BLOCK, b * BLOCK : (b + 1) * BLOCK]
            mass[:, a, b] = part[:, rows].sum((1, 2))
    kept = []
    for head in mass:
        best = head.argsort(-1, descending=True)[:, : M // 4].tolist()
        kept.append({(a, b) for a, row in enumerate(best) for b in row})
    return kept, mass


def share(found: set[Any], wanted: set[Any]) -> float:
    return len(found & wanted) / len(wanted)


def observed(seeds: dict[int, int]) -> dict[str, Any]:
    """What the observer says of one layer whose call at each step has the seed given."""
    watch = SearchAgreement(SCHEDULE)
    for step, seed in seeds.items():
        watch(Site(GRID, step=step, num_steps=STEPS), *random_call(seed))
    return watch.to_dict()


def test_counts_as_a_literal_search_does() -> None:
    found = observed({0: 0, 1: 1, 2: 9, 3: 2})
    assert found["steps"] == [1, 3]
    old = random_call(0)[2]
    every, sampled = range(BLOCK), range(2, BLOCK, 4)
    for place, seed in enumerate((1, 2)):
        q, k, new = random_call(seed)
        full, mass = literal_blocks(q, k, new, every)
        for row, rows in zip(found["row_strides"], (every, sampled), strict=True):
            cached, _ = literal_blocks(q, k, old, rows)
            same, _ = literal_blocks(q, k, new, rows)
            for head in range(HEADS):
                assert row["agreement"][place][0][head] == pytest.approx(share(cached[head], same[head]), abs=1e-4)
                assert row["agreement_full"][place][0][head] == pytest.approx(share(cached[head], full[head]), abs=1e-4)
                recall = sum(mass[head][pair] for pair in cached[head]) / mass[head].sum()
                assert row["recall"][place][0][head] == pytest.approx(float(recall), abs=1e-4)
        for head in range(HEADS):
            recall = sum(mass[head][pair] for pair in full[head]) / mass[head].sum()
            assert found["recall_full"][place][0][head] == pytest.approx(float(recall), abs=1e-4)
    assert any(x < 1 for step in found["row_strides"][0]["agreement"] for layer in step for x in layer)


def test_the_same_call_agrees_wholly() -> None:
    found = observed({0: 4, 1: 4})
    every, sampled = found["row_strides"]
    assert every["agreement"] == every["agreement_full"] == sampled["agreement"] == [[[1.0, 1.0]]]
    assert every["recall"] == found["recall_full"]
    assert sampled["recall"] < found["recall_full"]


def test_branches_have_row_sums_of_their_own() -> None:
    watch = SearchAgreement(SCHEDULE)
    for step in (0, 1):
        for seed, branch in enumerate(("cond", "uncond")):
            watch(Site(GRID, step=step, num_steps=STEPS, branch=branch), *random_call(seed))
    assert watch.to_dict()["row_strides"][0]["agreement"] == [[[1.0, 1.0]]]


def test_other_methods_and_no_warm_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be of adaspa, got 'neighborhood'"):
        SearchAgreement(Schedule(Neighborhood()))
    with pytest.raises(ValueError, match="must have a warm-up"):
        SearchAgreement(Schedule(AdaSpa(), warmup=0))
