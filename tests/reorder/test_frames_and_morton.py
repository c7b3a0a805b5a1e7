"""Blocks that end with their frame, and the Morton curve."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.reorder import frame_order, frames_once, morton_once, morton_order
from dit_sparse.types import TokenGrid


def test_blocks_share_a_frame_equally() -> None:
    order = frame_order(TokenGrid(2, 3, 5, text_len=9), 8)
    assert order.offsets[0, 0].tolist() == [0, 7, 15, 22, 30, 38, 39]
    assert order.is_identity


def test_a_cube_is_walked_in_eights() -> None:
    tokens = morton_order(TokenGrid(4, 4, 4), 8).index[0, 0]
    places = torch.stack([tokens // 16, tokens // 4 % 4, tokens % 4], 1)
    assert places[:8].tolist() == [[f, h, w] for f in (0, 1) for h in (0, 1) for w in (0, 1)]
    corners = places.view(8, 8, 3)
    assert ((corners.amax(1) - corners.amin(1)) == 1).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (21, 30, 52), (1, 33, 64)])
def test_any_grid_is_walked_once(shape: tuple[int, int, int]) -> None:
    grid = TokenGrid(*shape, text_len=3, text_first=True)
    order = morton_order(grid, 64)
    assert torch.equal(order.index[0, 0].sort().values, torch.arange(grid.num_tokens))
    assert order.index[0, 0, :3].tolist() == [0, 1, 2]


def test_bad_blocks_are_refused_and_orders_are_made_once() -> None:
    grid = TokenGrid(2, 3, 5)
    for make in (frame_order, morton_order):
        with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
            make(grid, 0)
    for once in (frames_once, morton_once):
        assert once(grid, 4, torch.device("cpu")) is once(grid, 4, torch.device("cpu"))
