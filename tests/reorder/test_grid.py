"""Orders of a whole sequence: text keeps its place and its own blocks, whatever the order of the video."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.reorder import AXIS_ORDERS, axis_order, curve_order, grid_order, raster_order, tile_order
from dit_sparse.types import TokenGrid

sides = st.integers(1, 7)
grids = st.builds(TokenGrid, sides, sides, sides, st.integers(0, 9), st.booleans())
block_sizes = st.integers(1, 40)


def any_order(grid, kind, block_size):
    if kind == "raster":
        return raster_order(grid, block_size)
    if kind == "curve":
        return curve_order(grid, block_size)
    if kind == "tiles":
        return tile_order(grid, (2, 3, 4))
    return axis_order(grid, kind, block_size)


@settings(deadline=None)
@given(grids, st.sampled_from(["raster", "curve", "tiles", *AXIS_ORDERS]), block_sizes)
def test_every_order_is_a_permutation_cut_into_covering_blocks(grid, kind, block_size):
    order = any_order(grid, kind, block_size)
    tokens = torch.arange(grid.num_tokens)
    assert torch.equal(order.index[0, 0].sort().values, tokens)
    assert torch.equal(order.index[0, 0][order.inverse[0, 0]], tokens)
    assert order.offsets[0, 0, 0] == 0
    assert order.offsets[0, 0, -1] == grid.num_tokens
    assert (order.block_sizes > 0).all()


@settings(deadline=None)
@given(grids, st.sampled_from(["raster", "curve", "tiles", *AXIS_ORDERS]), block_sizes)
def test_text_keeps_its_place_in_blocks_of_its_own(grid, kind, block_size):
    order = any_order(grid, kind, block_size)
    text = range(grid.text_start, grid.text_start + grid.text_len)
    assert all(order.index[0, 0, t] == t for t in text)
    bounds = order.offsets[0, 0].tolist()
    for start, end in itertools.pairwise(bounds):
        assert len({position in text for position in range(start, end)}) == 1


def test_blocks_are_of_the_size_asked_for_with_ragged_tails():
    text_last = raster_order(TokenGrid(2, 3, 4, text_len=7), 10)
    assert text_last.offsets[0, 0].tolist() == [0, 10, 20, 24, 31]
    text_first = raster_order(TokenGrid(2, 3, 4, text_len=12, text_first=True), 10)
    assert text_first.offsets[0, 0].tolist() == [0, 10, 12, 22, 32, 36]
    assert raster_order(TokenGrid(2, 3, 5), 10).offsets[0, 0].tolist() == [0, 10, 20, 30]


def test_raster_order_is_the_identity():
    order = raster_order(TokenGrid(2, 3, 4, text_len=5), 8)
    assert order.is_identity
    assert torch.equal(order.index[0, 0], torch.arange(29))


@pytest.mark.parametrize("text_first", [False, True])
def test_given_offsets_and_a_video_order_per_head_are_kept(text_first):
    grid = TokenGrid(1, 2, 3, text_len=2, text_first=text_first)
    video = torch.stack([torch.arange(6), torch.arange(6).flip(0)])
    order = grid_order(grid, video, block_size=4, video_offsets=torch.tensor([[0, 1, 6], [0, 5, 6]]))
    assert order.index.shape == (1, 2, 8)
    assert order.offsets.shape == (1, 2, 4)
    assert order.offsets[0].tolist() == ([[0, 2, 3, 8], [0, 2, 7, 8]] if text_first else [[0, 1, 6, 8], [0, 5, 6, 8]])
    start = grid.video_start
    assert (order.index[0, 1, start : start + 6] - start).tolist() == [5, 4, 3, 2, 1, 0]


def test_an_index_with_batch_and_head_keeps_both():
    grid = TokenGrid(1, 1, 4, text_len=1)
    index = torch.stack([torch.randperm(4) for _ in range(6)]).reshape(2, 3, 4)
    order = grid_order(grid, index, block_size=2)
    assert torch.equal(order.index[..., :4], index)
    assert order.offsets.shape == (1, 1, 4)


def test_offsets_may_be_a_plain_list():
    order = grid_order(TokenGrid(1, 1, 4), torch.arange(4), block_size=2, video_offsets=[0, 3, 3, 4])
    assert order.offsets[0, 0].tolist() == [0, 3, 3, 4]
    assert order.offsets.dtype == torch.int32


@pytest.mark.parametrize("offsets", [[1, 4], [0, 3], [0, 3, 2, 4]])
def test_offsets_that_do_not_span_the_video_are_refused(offsets):
    with pytest.raises(ValueError, match="video_offsets must rise from 0 to the 4"):
        grid_order(TokenGrid(1, 1, 4), torch.arange(4), block_size=2, video_offsets=offsets)


def test_bad_arguments_are_named():
    grid = TokenGrid(1, 2, 2, text_len=3)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        raster_order(grid, 0)
    with pytest.raises(ValueError, match="video_index must hold the 4 video tokens"):
        grid_order(grid, torch.arange(7), block_size=2)
    with pytest.raises(ValueError, match="1 to 3 dimensions"):
        grid_order(grid, torch.arange(4).reshape(1, 1, 1, 4), block_size=2)
