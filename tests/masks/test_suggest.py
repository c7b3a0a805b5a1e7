"""Suggested settings keep the density that was asked for, and their counts are those of the mask itself."""

from __future__ import annotations

import math

import pytest
import torch

from dit_sparse.masks import Setting, count_tiles, neighborhood_predicate, suggest_settings
from dit_sparse.types import TokenGrid


@pytest.mark.parametrize(
    "grid",
    [TokenGrid(8, 24, 32), TokenGrid(7, 15, 26, text_len=64), TokenGrid(1, 64, 64), TokenGrid(1, 1, 512)],
    ids=str,
)
@pytest.mark.parametrize("density", [0.15, 0.5])
def test_suggestions_are_near_the_density_and_are_what_they_say(grid: TokenGrid, density: float) -> None:
    found = suggest_settings(grid, density, count=4)
    assert 1 <= len({setting.window for setting in found}) == len(found) <= 4
    for setting in found:
        mask = neighborhood_predicate(grid, setting.window, setting.stride)
        assert count_tiles(mask, setting.counts.tile) == setting.counts
        assert setting.expected_speedup == pytest.approx(setting.counts.expected_speedup())
        # Windows are whole tiles, and a short line of 512 tokens has only eight.
        near = 0.11 if grid.shape != (1, 1, 512) else 0.26
        assert setting.counts.density == pytest.approx(density, rel=near)


def reach(grid: TokenGrid, window: tuple[int, int, int], stride: tuple[int, int, int]) -> float:
    """The least share of an axis that the narrowest window around any of its queries has, found query by query."""
    mask, shares = neighborhood_predicate(grid, window, stride), []
    for axis in (axis for axis in mask.axes if axis.length > 1):
        query = torch.arange(axis.length)
        _, start, end = axis.bounds(query)
        # At a border a window ends with the axis, so that side does not count.
        before = torch.where(start > 0, query - start, axis.length)
        after = torch.where(end < axis.length, end - 1 - query, axis.length)
        shares.append(min(1.0, (int(before.min()) + int(after.min()) + 1) / axis.length))
    return min(shares)


@pytest.mark.parametrize(
    ("grid", "density"),
    [(TokenGrid(8, 24, 32), 0.25), (TokenGrid(8, 24, 32), 0.125), (TokenGrid(21, 30, 52), 0.25)],
    ids=str,
)
def test_no_suggestion_is_better_than_the_first_in_every_way(grid: TokenGrid, density: float) -> None:
    """As efficient, as far-reaching and as compact, and 5% more of one of them."""

    def merits(setting: Setting) -> list[float]:
        tile = setting.counts.tile
        compactness = math.prod(tile) ** (1 / 3) / max(tile)
        far = reach(grid, setting.window, setting.stride)
        return [setting.expected_speedup * setting.counts.density, far, compactness]

    first, *others = map(merits, suggest_settings(grid, density, count=32))
    assert first[0] > 0.75 * max(other[0] for other in others)
    for other in others:
        ratios = [a / b for a, b in zip(other, first, strict=True)]
        assert min(ratios) < 1 or max(ratios) < 1.05


def test_windows_of_blocks_that_see_only_themselves_do_not_come_first() -> None:
    """They are the fastest on this grid: 6x16x16 in strides of 1x16x16."""
    grid = TokenGrid(8, 24, 32)
    first = suggest_settings(grid, 0.25)[0]
    assert reach(grid, (6, 16, 16), (1, 16, 16)) < 0.1
    assert reach(grid, first.window, first.stride) > 0.25
    assert first.counts.cut == 0
    assert first.expected_speedup > 3


def test_where_grid_and_tiles_allow_the_first_suggestion_cuts_no_tile() -> None:
    best = suggest_settings(TokenGrid(8, 24, 32), 0.1)[0]
    assert best.counts.cut == 0
    assert best.counts.tile_speedup == pytest.approx(best.counts.ideal_speedup)


def test_a_density_that_no_window_meets_gets_the_nearest() -> None:
    assert suggest_settings(TokenGrid(1, 2, 2), 0.01)[0].counts.density >= 0.25


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_outside_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density must be above 0"):
        suggest_settings(TokenGrid(2, 4, 4), density)
