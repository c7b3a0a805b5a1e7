"""The six axis orders against nested loops."""

import pytest
import torch

from dit_sparse.reorder import AXIS_ORDERS, axis_order, axis_orders_per_head, distinct_axis_orders
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


@pytest.mark.parametrize("axes", AXIS_ORDERS)
@pytest.mark.parametrize("text_first", [False, True])
def test_axis_order_nests_the_axes_as_named(axes, text_first):
    grid = TokenGrid(3, 2, 5, text_len=4, text_first=text_first)
    index = axis_order(grid, axes, 8).index[0, 0]
    video = index[grid.video_start : grid.video_start + 30] - grid.video_start
    assert video.tolist() == tokens_by_loops(grid, axes)


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
    for head, axes in enumerate(names):
        assert torch.equal(order.index[0, head], axis_order(grid, axes, 8).index[0, 0])
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


@pytest.mark.parametrize("sizes", [(3, 2, 5), (1, 4, 5), (3, 1, 5), (3, 2, 1), (1, 1, 5), (1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("text_first", [False, True])
def test_distinct_orders_are_all_that_differ(sizes, text_first):
    grid = TokenGrid(*sizes, text_len=3, text_first=text_first)
    names = distinct_axis_orders(grid)
    walks = {axes: tuple(axis_order(grid, axes, 8).index[0, 0].tolist()) for axes in AXIS_ORDERS}
    assert len({walks[axes] for axes in names}) == len(names)
    assert {walks[axes] for axes in names} == set(walks.values())
    assert names[0] == "FHW"


def test_an_image_has_two_orders():
    assert distinct_axis_orders(TokenGrid(1, 4, 6)) == ("FHW", "FWH")
