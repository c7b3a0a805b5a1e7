"""Tokens sorted within segments."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import TokenGrid
from dit_sparse.reorder import raster_order, sort_in_segments
from tests.methods.test_no_wait import NoWaiting


@pytest.mark.parametrize("text_first", [False, True])
def test_each_segment_falls_and_text_stays(text_first: bool) -> None:
    grid = TokenGrid(1, 5, 6, 3, text_first)
    order = raster_order(grid, 4)
    order.geometry  # noqa: B018
    importance = torch.rand(2, 2, grid.num_tokens, generator=torch.Generator().manual_seed(0))
    with NoWaiting():
        got = sort_in_segments(order, grid, importance, 8)
    assert torch.equal(got.offsets, order.offsets)
    assert got.geometry == order.geometry
    for b in range(2):
        for h in range(2):
            index = got.index[b, h].tolist()
            assert all(index[int(got.inverse[b, h, token])] == token for token in range(len(index)))
            text = list(range(grid.text_start, grid.text_start + 3))
            assert (index[:3] if text_first else index[30:]) == text
            video = index[3:] if text_first else index[:30]
            for start in range(0, 30, 8):
                part = video[start : start + 8]
                assert sorted(part) == [grid.video_start + i for i in range(start, min(start + 8, 30))]
                values = importance[b, h, part]
                assert (values.diff() <= 0).all()


def test_equal_tokens_keep_their_order() -> None:
    grid = TokenGrid(1, 4, 4)
    got = sort_in_segments(raster_order(grid, 4), grid, torch.ones(1, 1, 16), 8)
    assert got.index[0, 0].tolist() == list(range(16))


def test_bad_input() -> None:
    grid = TokenGrid(1, 4, 4)
    with pytest.raises(ValueError, match="segment must be at least 1"):
        sort_in_segments(raster_order(grid, 4), grid, torch.ones(1, 1, 16), 0)
    with pytest.raises(ValueError, match="importance must be of 16 tokens, got 15"):
        sort_in_segments(raster_order(grid, 4), grid, torch.ones(1, 1, 15), 8)
