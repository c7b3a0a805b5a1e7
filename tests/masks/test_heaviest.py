"""Static masks of the heaviest blocks, against sorting everything."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.masks import blocks_above, blocks_within, heaviest_blocks, heaviest_share, mass_threshold
from dit_sparse.reorder import raster_order
from dit_sparse.types import TokenGrid

GRIDS = [TokenGrid(1, 8, 8), TokenGrid(3, 5, 7), TokenGrid(2, 4, 4, 9, True), TokenGrid(2, 4, 4, 9)]


def masses(grid: TokenGrid, count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    blocks = raster_order(grid, 8).num_blocks
    return [torch.rand(1, 2, blocks, blocks, generator=generator) ** 3 for _ in range(count)]


def density_of(kept: Tensor, grid: TokenGrid) -> Tensor:
    sizes = raster_order(grid, 8).block_sizes[0, 0].double()
    return (kept * sizes[:, None] * sizes[None]).sum((-1, -2)) / grid.num_tokens**2


def text_rows(grid: TokenGrid) -> list[bool]:
    offsets = raster_order(grid, 8).offsets[0, 0].tolist()
    text = range(grid.text_start, grid.text_start + grid.text_len)
    return [start in text for start in offsets[:-1]]


def test_a_head_keeps_its_heaviest_blocks() -> None:
    grid = TokenGrid(1, 8, 8)
    (mass,) = masses(grid, 1)
    kept = heaviest_blocks(mass, 0.5, raster_order(grid, 8).offsets, grid)
    assert kept.sum((-1, -2)).tolist() == [[32, 32]]
    best = torch.zeros_like(kept).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    assert (kept | best).equal(kept)
    least_kept = mass.masked_fill(~kept | best, torch.inf).flatten(2).min(-1).values
    assert (mass.masked_fill(kept, -torch.inf).flatten(2).max(-1).values <= least_kept).all()


def literal_threshold_mask(all_masses: list[Tensor], density: float, grid: TokenGrid) -> list[Tensor]:
    """One threshold for all heads: what is forced, then block by block from the heaviest while the budget lasts."""
    sizes = raster_order(grid, 8).block_sizes[0, 0].tolist()
    text = text_rows(grid)
    kept = [torch.zeros_like(mass, dtype=torch.bool) for mass in all_masses]
    free, spent = [], 0
    for number, mass in enumerate(all_masses):
        for head in range(mass.shape[1]):
            for i in range(len(sizes)):
                heaviest = int(mass[0, head, i].argmax())
                for j in range(len(sizes)):
                    if text[i] or text[j] or j == heaviest:
                        kept[number][0, head, i, j] = True
                        spent += sizes[i] * sizes[j]
                    else:
                        free.append((float(mass[0, head, i, j]), number, head, i, j))
    budget = density * grid.num_tokens**2 * sum(mass.shape[1] for mass in all_masses)
    for _, number, head, i, j in sorted(free, reverse=True):
        spent += sizes[i] * sizes[j]
        if spent > budget:
            break
        kept[number][0, head, i, j] = True
    return kept


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.7, 1.0])
def test_one_threshold_serves_all_heads(grid: TokenGrid, density: float) -> None:
    given = masses(grid, 3)
    given[1] *= 0.01  # heads of little mass keep little
    offsets = raster_order(grid, 8).offsets
    threshold = mass_threshold(lambda: iter(given), density, offsets, grid)
    got = [blocks_above(mass, threshold, offsets, grid) for mass in given]
    for mask, want in zip(got, literal_threshold_mask(given, density, grid), strict=True):
        assert torch.equal(mask, want)


def test_one_threshold_looks_at_one_mass_at_a_time() -> None:
    grid = TokenGrid(1, 8, 8)
    alive = []

    def given():
        for mass in masses(grid, 4):
            alive.append(mass)
            yield mass

    assert 0 < mass_threshold(given, 0.3, raster_order(grid, 8).offsets, grid) < 1
    assert len(alive) == 8


def test_equal_masses_are_all_kept_or_all_dropped() -> None:
    grid = TokenGrid(1, 8, 8)
    offsets = raster_order(grid, 8).offsets
    mass = torch.ones(1, 1, 8, 8)
    threshold = mass_threshold(lambda: iter([mass]), 0.5, offsets, grid)
    assert density_of(blocks_above(mass, threshold, offsets, grid), grid).item() == pytest.approx(1 / 8)
    assert bool(blocks_above(mass, mass_threshold(lambda: iter([mass]), 1.0, offsets, grid), offsets, grid).all())
    assert mass_threshold(lambda: iter([mass * 0]), 0.5, offsets, grid) > 0


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_head_keeps_its_largest_until_they_hold_the_share(share: float) -> None:
    scores = torch.rand(2, 2, 5, 4)
    forced = torch.eye(5, 4, dtype=torch.bool)
    sizes = torch.tensor([3, 1, 4, 1, 2])
    got = heaviest_share(scores, forced, sizes[None, None], share)
    for head, kept in zip(scores.flatten(0, 1), got.flatten(0, 1), strict=True):
        weights = {(i, j): float(head[i, j].double() * sizes[i]) for i in range(5) for j in range(4)}
        chosen = {place for place in weights if forced[place]}
        for place in sorted(weights, key=lambda at: -float(head[at])):
            if sum(weights[at] for at in chosen) >= share * sum(weights.values()) - 1e-12:
                break
            chosen.add(place)
        assert {(i, j) for i in range(5) for j in range(4) if kept[i, j]} == chosen


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.05, 0.4, 1.0])
def test_what_is_left_out_errs_by_at_most_as_much(grid: TokenGrid, share: float) -> None:
    order = raster_order(grid, 8)
    errors = torch.cat(masses(grid, 3))  # three samples
    most = share * torch.tensor([1.0, 1.0, 0.5]) * errors.sum((-1, -2, -3))
    kept = blocks_within(errors, most, order.offsets, order.offsets, grid)
    sizes = order.block_sizes[0, 0]
    text = torch.tensor(text_rows(grid))
    best = torch.zeros_like(kept).scatter_(-1, errors.argmax(-1, keepdim=True), True)
    sure = best | text | text[:, None]
    assert (kept | sure).equal(kept)
    for own, limit, found, certain in zip(errors.double(), most.tolist(), kept, sure, strict=True):
        worth = own / (sizes * sizes[:, None])
        places = sorted((~certain).nonzero().tolist(), key=lambda place: float(worth[tuple(place)]))
        left = 0.0
        for place in places:
            left += float(own[tuple(place)])
            assert bool(found[tuple(place)]) == (left > limit * (1 + 1e-6)) or abs(left / limit - 1) < 1e-6
    assert share < 1 or kept[0].equal(sure[0])
    assert share > 0 or kept.all()


def test_what_is_no_number_is_kept() -> None:
    grid = TokenGrid(1, 8, 8)
    (errors,) = masses(grid, 1)
    errors[0, 1, 2, 3] = torch.nan
    offsets = raster_order(grid, 8).offsets
    assert blocks_within(errors, torch.tensor([1e9]), offsets, offsets, grid)[0, 1, 2, 3]
