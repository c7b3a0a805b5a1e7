"""Suggested settings keep the density that was asked for, and their counts are those of the mask itself."""

from __future__ import annotations

import pytest

from dit_sparse.masks import count_tiles, neighborhood_predicate, suggest_settings
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
