"""The six axis orders, in runs and in tiles, against nested loops."""

from itertools import chain, product

import pytest
import torch

from dit_sparse.reorder import (
    AXIS_ORDERS,
    axis_order,
    axis_orders_per_head,
    distinct_axis_orders,
    tile_along,
    tile_order,
)
from dit_sparse.types import TokenGrid


def tokens_by_loops(grid, axes):
    sizes = dict(zip("FHW", grid.shape, strict=True))
    tokens = []
    for i in range(sizes[axes[0]]):
        for j in range(sizes[axes[1]]):
            for k in range(sizes[axes[2]]):
                at = dict(zip(axes, (i, j, k), strict=True))
                tokens.append((at["F"] * grid.height + at["H"]) * grid.width + at["W"])
    return tokens


def tiles_by_loops(grid, axes, tile):
    """The tokens of every tile, tiles and tokens walked as `axes` say; smaller tiles last."""
    sizes = dict(zip("FHW", grid.shape, strict=True))
    tiles = []
    for corner in product(*(range(0, sizes[axis], side) for axis, side in zip(axes, tile, strict=True))):
        ends = (min(c + side, sizes[axis]) for c, side, axis in zip(corner, tile, axes, strict=True))
        places = product(*(range(c, end) for c, end in zip(corner, ends, strict=True)))
        tokens = [dict(zip(axes, place, strict=True)) for place in places]
        tiles.append([(at["F"] * grid.height + at["H"]) * grid.width + at["W"] for at in tokens])
    return sorted(tiles, key=lambda tokens: len(tokens) < tile[0] * tile[1] * tile[2])


@pytest.mark.parametrize("axes", AXIS_ORDERS)
@pytest.mark.parametrize("text_first", [False, True])
def test_axis_order_nests_the_axes_as_named(axes, text_first):
    grid = TokenGrid(3, 2, 5, text_len=4, text_first=text_first)
    index = axis_order(grid, axes, 8).index[0, 0]
    video = index[grid.video_start : grid.video_start + 30] - grid.video_start
    assert video.tolist() == tokens_by_loops(grid, axes)


@pytest.mark.parametrize("axes", AXIS_ORDERS)
@pytest.mark.parametrize("tile", [(1, 2, 3), (2, 2, 2), (1, 1, 4), (9, 9, 9)])
@pytest.mark.parametrize("text_first", [False, True])
def test_tiles_have_their_sides_along_the_axes_as_walked(axes, tile, text_first):
    grid = TokenGrid(4, 3, 5, text_len=7, text_first=text_first)
    order = axis_order(grid, axes, tile)
    video = order.index[0, 0, grid.video_start : grid.video_start + 60] - grid.video_start
    tiles = tiles_by_loops(grid, axes, tile)
    assert video.tolist() == list(chain.from_iterable(tiles))
    # All blocks but the last one of the video and of the text are full.
    size = tile[0] * tile[1] * tile[2]
    sizes = [[min(size, length - start) for start in range(0, length, size)] for length in (60, 7)]
    assert order.block_sizes[0, 0].tolist() == list(chain.from_iterable(sizes[::-1] if text_first else sizes))


def test_tiles_in_raster_nesting_are_those_of_the_tile_order():
    grid = TokenGrid(4, 3, 5, text_len=7)
    got, want = axis_order(grid, "FHW", (2, 2, 2)), tile_order(grid, (2, 2, 2), even=True)
    assert torch.equal(got.index, want.index)
    assert torch.equal(got.offsets, want.offsets)
    assert not axis_order(grid, "FHW", (1, 1, 5)).is_identity


def test_only_the_raster_order_is_an_identity():
    grid = TokenGrid(3, 2, 5)
    assert [axis_order(grid, axes, 8).is_identity for axes in AXIS_ORDERS] == [True] + [False] * 5
    assert axis_orders_per_head(grid, ["FHW", "FHW"], 8).is_identity
    assert not axis_orders_per_head(grid, ["FHW", "WHF"], 8).is_identity


def test_one_order_per_head():
    grid = TokenGrid(3, 2, 5, text_len=2)
    names = ["HWF", "FHW", "WFH", "HWF"]
    order = axis_orders_per_head(grid, names, 8)
    assert order.index.shape == (1, 4, 32)
    assert order.offsets.shape == (1, 1, 6)
    tiled = axis_orders_per_head(grid, names, (2, 1, 4))
    assert torch.equal(tiled.offsets, order.offsets)
    for head, axes in enumerate(names):
        assert torch.equal(order.index[0, head], axis_order(grid, axes, 8).index[0, 0])
        assert torch.equal(tiled.index[0, head], axis_order(grid, axes, (2, 1, 4)).index[0, 0])
    x = torch.randn(2, 4, 32, 3)
    assert torch.equal(order.restore(order.permute(x)), x)


def test_unknown_names_are_refused():
    grid = TokenGrid(3, 2, 5)
    with pytest.raises(ValueError, match=r"axes must be one of FHW.*got 'fhw'"):
        axis_order(grid, "fhw", 8)
    with pytest.raises(ValueError, match="axes_per_head must be a list"):
        axis_orders_per_head(grid, [], 8)
    with pytest.raises(ValueError, match="axes_per_head must be a list"):
        axis_orders_per_head(grid, "FHW", 8)
    with pytest.raises(ValueError, match=r"block must be .*got \(2, 0, 4\)"):
        axis_order(grid, "FHW", (2, 0, 4))
    with pytest.raises(ValueError, match=r"block must be .*got \(2, 4\)"):
        axis_order(grid, "FHW", (2, 4))


@pytest.mark.parametrize("sizes", [(3, 2, 5), (1, 4, 5), (3, 1, 5), (3, 2, 1), (1, 1, 5), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("text_first", [False, True])
def test_distinct_orders_are_all_that_differ(sizes, text_first):
    grid = TokenGrid(*sizes, text_len=3, text_first=text_first)
    names = distinct_axis_orders(grid)
    walks = {axes: tuple(axis_order(grid, axes, 8).index[0, 0].tolist()) for axes in AXIS_ORDERS}
    assert len({walks[axes] for axes in names}) == len(names)
    assert {walks[axes] for axes in names} == set(walks.values())
    assert names[0] == "FHW"


@pytest.mark.parametrize("sizes", [(4, 6, 8), (1, 6, 8), (1, 2, 8)])
@pytest.mark.parametrize(("tile", "count"), [((1, 2, 3), 6), ((2, 2, 4), 3), ((2, 2, 2), 1)])
def test_distinct_tilings_are_all_that_differ(sizes, tile, count):
    grid = TokenGrid(*sizes)
    names = distinct_axis_orders(grid, tile)
    tilings = {axes: frozenset(map(frozenset, tiles_by_loops(grid, axes, tile))) for axes in AXIS_ORDERS}
    assert {tilings[axes] for axes in names} == set(tilings.values())
    assert sizes != (4, 6, 8) or len(names) == len(set(tilings.values())) == count


@pytest.mark.parametrize(("sizes", "tile"), [((3, 8, 8), (4, 4, 4)), ((1, 8, 8), (4, 4, 4)), ((2, 4, 8), (2, 4, 8))])
def test_orders_whose_blocks_are_several_tiles_differ_by_their_walk(sizes, tile):
    grid = TokenGrid(*sizes)

    def blocks(axes: str) -> frozenset[frozenset[int]]:
        order = axis_order(grid, axes, tile)
        return frozenset(frozenset(part.tolist()) for part in order.index[0, 0].split(order.block_sizes[0, 0].tolist()))

    found = {axes: blocks(axes) for axes in AXIS_ORDERS}
    assert {found[axes] for axes in distinct_axis_orders(grid, tile)} == set(found.values())


def test_sides_of_a_tile_along_the_grid():
    grid = TokenGrid(8, 24, 3)
    assert [tile_along(grid, axes, (1, 2, 4)) for axes in ("FHW", "HWF", "WFH")] == [(1, 2, 3), (4, 1, 2), (2, 4, 1)]


def test_an_image_has_two_orders():
    assert distinct_axis_orders(TokenGrid(1, 4, 6)) == ("FHW", "FWH")
