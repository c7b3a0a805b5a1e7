"""The oracle against a literal choice from the whole attention map, and against every other choice."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from dit_sparse import AdaSpa, Oracle, Site, TokenGrid
from tests.methods.literal import GRIDS, fill, random_qkv, raster_blocks, weights_of


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
def test_equals_the_literal_choice(grid: TokenGrid, density: float) -> None:
    """Blocks of all heads in one list, by mass a pair; each taken while it fits."""
    q, k, v = random_qkv(grid)
    plan = Oracle(density, block=8).plan(q, k, v, Site(grid), None)
    blocks, heads = raster_blocks(grid, 8), q.shape[1]
    for b in range(q.shape[0]):
        entries, chosen = [], [set() for _ in range(heads)]
        for h in range(heads):
            weights = weights_of(q[b, h], k[b, h])
            for i, query in enumerate(blocks):
                mass = [float(weights[query.tokens][:, key.tokens].sum()) for key in blocks]
                chosen[h].add((i, max(range(len(blocks)), key=lambda j, mass=mass: mass[j])))
                for j, key in enumerate(blocks):
                    entries.append((mass[j] / (len(query.tokens) * len(key.tokens)), h, i, j))
        areas = [float(fill(c, blocks, blocks, grid.num_tokens).sum()) for c in chosen]
        for _, h, i, j in sorted(entries, reverse=True):
            more = float(fill(chosen[h] | {(i, j)}, blocks, blocks, grid.num_tokens).sum())
            if sum(areas) - areas[h] + more > density * heads * grid.num_tokens**2:
                break
            chosen[h].add((i, j))
            areas[h] = more
        want = torch.stack([fill(c, blocks, blocks, grid.num_tokens) for c in chosen])
        assert torch.equal(plan.token_mask()[b], want)


def test_no_other_choice_of_as_many_blocks_holds_more() -> None:
    grid = TokenGrid(1, 4, 4)
    q, k, v = random_qkv(grid, batch=1, heads=1)
    kept = Oracle(0.5, block=4).plan(q, k, v, Site(grid), None).token_mask()[0, 0]
    weights = weights_of(q[0, 0], k[0, 0])
    pairs = [(i, j) for i in range(4) for j in range(4)]
    mass = {(i, j): float(weights[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum()) for i, j in pairs}
    whole = [c for c in combinations(pairs, 8) if {i for i, _ in c} == {0, 1, 2, 3}]
    assert int(kept.sum()) == 8 * 16
    assert float(weights[kept].sum()) == pytest.approx(max(sum(mass[p] for p in c) for c in whole))


def test_it_recalls_more_than_a_method_with_the_same_blocks() -> None:
    grid = TokenGrid(2, 8, 8, text_len=6)
    q, k, v = random_qkv(grid, batch=1)
    plans = (method.plan(q, k, v, Site(grid), None) for method in (Oracle(0.3, block=16), AdaSpa(0.3, block=16)))
    best, other = (plan.token_mask().expand(1, 3, -1, -1) for plan in plans)
    weights = torch.stack([weights_of(q[0, h], k[0, h]) for h in range(3)])[None]
    assert float(best.double().mean()) <= float(other.double().mean()) + 0.02
    assert (weights * best).sum() > (weights * other).sum()


@pytest.mark.parametrize("in_order", [False, True])
def test_tiles(in_order: bool) -> None:
    """With a tile as large as a row of the raster, the two orders are the same."""
    grid = TokenGrid(2, 4, 8)
    q, k, v = random_qkv(grid)
    method = Oracle(0.4, tile=(1, 1, 8))
    want = Oracle(0.4, block=8).plan(q, k, v, Site(grid), None)
    got = method.plan(q, k, v, Site(grid, in_order=in_order), None)
    assert torch.equal(got.token_mask(), want.token_mask())
    assert got.q_order is method.shared_order(grid, q.device)


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"block": 0}, "block"), ({"tile": (1, 0, 2)}, "tile")]
)
def test_bad_parameters(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Oracle(**options)  # type: ignore[arg-type]
