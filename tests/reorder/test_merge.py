"""Merged blocks against bounds counted one by one."""

from __future__ import annotations

import itertools

import pytest
import torch

from dit_sparse import LeastError, TokenGrid
from dit_sparse.reorder import axis_orders_per_head, merge_blocks, merged_once, tile_order, tiles_once


@pytest.mark.parametrize("count", [1, 2, 3, 50])
@pytest.mark.parametrize(
    "grid",
    [TokenGrid(3, 5, 7), TokenGrid(3, 5, 7, text_len=9), TokenGrid(3, 5, 7, text_len=9, text_first=True)],
    ids=str,
)
def test_neighbouring_tiles_become_one_block_and_text_stays_apart(grid: TokenGrid, count: int) -> None:
    order = tile_order(grid, (2, 2, 2))
    merged = merge_blocks(order, grid, count)
    assert merged.index is order.index
    assert merged.inverse is order.inverse
    sizes = order.block_sizes[0, 0].tolist()
    starts = order.offsets[0, 0, :-1].tolist()
    text = [grid.text_start <= start < grid.text_start + grid.text_len for start in starts]
    groups: list[list[int]] = []
    was_text = True
    for size, is_text in zip(sizes, text, strict=True):
        if is_text or was_text or len(groups[-1]) == count:
            groups.append([])
        groups[-1].append(size)
        was_text = is_text
    want = [0, *itertools.accumulate(sum(group) for group in groups)]
    assert merged.offsets[0, 0].tolist() == want
    assert merged.geometry.largest == max(sum(group) for group in groups)


def test_made_once_and_of_the_same_tokens() -> None:
    grid, device = TokenGrid(2, 4, 6), torch.device("cpu")
    order = tiles_once(grid, (1, 2, 3), device, True)
    merged = merged_once(order, grid, 2)
    assert merged is merged_once(order, grid, 2)
    assert merged is not merged_once(order, grid, 3)
    assert merged_once(order, grid, 1) is order


def test_orders_that_were_forgotten_are_made_anew_together() -> None:
    """Sequences of more layouts than are remembered."""
    method, device = LeastError(), torch.device("cpu")
    grids = [TokenGrid(2, 4, width) for width in range(4, 40)]
    for grid in [*grids, *grids[:3], *grids]:
        assert method.query_order(grid, device).index is method.shared_order(grid, device).index


def test_what_cannot_be_merged() -> None:
    grid = TokenGrid(2, 4, 6)
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        merge_blocks(tile_order(grid, (1, 2, 3)), grid, 0)
    order = axis_orders_per_head(grid, ["FHW", "HWF"], 8)
    per_head = type(order)(order.index, order.inverse, order.offsets.expand(1, 2, -1))
    with pytest.raises(ValueError, match="share them"):
        merge_blocks(per_head, grid, 2)
