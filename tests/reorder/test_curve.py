"""The space-filling curve: neighbours follow each other on grids of every parity, and blocks are compact."""

from itertools import product

import pytest
import torch

from dit_sparse.reorder import curve_order, raster_order
from dit_sparse.types import TokenGrid


def coordinates(grid, block_size=64, order_of=curve_order):
    tokens = order_of(grid, block_size).index[0, 0]
    plane = grid.height * grid.width
    return torch.stack([tokens // plane, tokens // grid.width % grid.height, tokens % grid.width], dim=1)


def steps(grid):
    return coordinates(grid).diff(dim=0).abs().sum(1)


def test_every_step_goes_to_a_neighbour_on_all_small_grids():
    for shape in product(range(1, 8), repeat=3):
        grid = TokenGrid(*shape)
        assert (steps(grid) == 1).all(), shape
        assert torch.equal(curve_order(grid, 8).index[0, 0].sort().values, torch.arange(grid.video_len)), shape


@pytest.mark.parametrize(
    "shape", [(21, 30, 52), (13, 30, 45), (15, 17, 19), (1, 64, 64), (1, 33, 35), (2, 1, 81), (8, 6, 8)]
)
def test_every_step_goes_to_a_neighbour_on_real_grids(shape):
    assert (steps(TokenGrid(*shape)) == 1).all()


@pytest.mark.parametrize("shape", [(8, 16, 16), (21, 30, 52), (13, 15, 17)])
def test_blocks_are_more_compact_than_the_rasters(shape):
    grid = TokenGrid(*shape)
    whole = grid.video_len // 64 * 64

    def spread(order_of):
        blocks = coordinates(grid, 64, order_of)[:whole].float().reshape(-1, 64, 3)
        return blocks.var(dim=1).sum(-1).mean()

    assert spread(curve_order) < spread(raster_order) / 3


def test_text_keeps_its_place():
    order = curve_order(TokenGrid(2, 4, 4, text_len=5, text_first=True), 16)
    assert order.index[0, 0, :5].tolist() == [0, 1, 2, 3, 4]
    assert order.offsets[0, 0].tolist() == [0, 5, 21, 37]


def test_a_block_size_below_one_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        curve_order(TokenGrid(2, 4, 4), 0)
