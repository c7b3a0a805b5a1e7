"""Windows of whole tiles against loops over tokens."""

from __future__ import annotations

import pytest

from dit_sparse.masks import tile_window, tile_window_density
from dit_sparse.reorder import tile_order
from dit_sparse.types import AttentionPlan, TokenGrid
from tests.methods.test_sta import literal_mask

GRIDS = [TokenGrid(3, 5, 7), TokenGrid(2, 4, 5, text_len=9), TokenGrid(1, 5, 6, text_len=3, text_first=True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [(1, 1, 1), (1, 2, 3), (1, 3, 2)])
def test_tiles_see_each_other_as_tokens_do(grid: TokenGrid, window: tuple[int, int, int]) -> None:
    tile = (2, 2, 2)
    order = tile_order(grid, tile)
    plan = AttentionPlan.from_kept(order, tile_window(window, tile, grid, order.num_blocks)[None, None])
    want = literal_mask(grid, tile, window)
    assert plan.token_mask()[0, 0].equal(want)
    assert tile_window_density(window, tile, grid) == pytest.approx(float(want.double().mean()))
