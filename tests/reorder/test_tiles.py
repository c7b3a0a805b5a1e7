"""Tile orders against nested loops over tiles."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.reorder import tile_order
from dit_sparse.types import TokenGrid

sides = st.integers(1, 7)
tiles = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9))


def tiles_by_loops(grid, tile):
    """The tokens of every tile, tile by tile."""
    blocks = []
    for f0 in range(0, grid.frames, tile[0]):
        for h0 in range(0, grid.height, tile[1]):
            for w0 in range(0, grid.width, tile[2]):
                blocks.append(
                    [
                        (f * grid.height + h) * grid.width + w
                        for f in range(f0, min(f0 + tile[0], grid.frames))
                        for h in range(h0, min(h0 + tile[1], grid.height))
                        for w in range(w0, min(w0 + tile[2], grid.width))
                    ]
                )
    return blocks


@settings(deadline=None)
@given(st.builds(TokenGrid, sides, sides, sides), tiles)
def test_one_tile_is_one_block_in_raster_order(grid, tile):
    order = tile_order(grid, tile)
    bounds = order.offsets[0, 0].tolist()
    blocks = [order.index[0, 0, a:b].tolist() for a, b in itertools.pairwise(bounds)]
    assert blocks == tiles_by_loops(grid, tile)


@settings(deadline=None)
@given(st.builds(TokenGrid, sides, sides, sides), tiles)
def test_whole_tiles_come_first(grid, tile):
    order = tile_order(grid, tile, whole_first=True)
    bounds = order.offsets[0, 0].tolist()
    blocks = [order.index[0, 0, a:b].tolist() for a, b in itertools.pairwise(bounds)]
    volume = tile[0] * tile[1] * tile[2]
    assert blocks == sorted(tiles_by_loops(grid, tile), key=lambda block: len(block) < volume)


def test_border_tiles_are_smaller_and_text_comes_in_blocks_of_the_tiles_volume():
    order = tile_order(TokenGrid(3, 4, 4, text_len=20, text_first=True), (2, 2, 4))
    assert order.block_sizes[0, 0].tolist() == [16, 4, 16, 16, 8, 8]


@pytest.mark.parametrize("tile", [(2, 8), (2, 0, 8), (1, 1, 1, 1)])
def test_a_tile_that_is_not_three_sizes_is_refused(tile):
    with pytest.raises(ValueError, match="tile must be three sizes"):
        tile_order(TokenGrid(3, 4, 4), tile)
