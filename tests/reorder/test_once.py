"""Orders made once: equal to fresh ones, the same object again, and usable outside inference mode."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dit_sparse import TokenGrid
from dit_sparse.reorder import (
    axes_once,
    axis_order,
    curve_once,
    curve_order,
    raster_once,
    raster_order,
    tile_order,
    tiles_once,
)

GRID = TokenGrid(3, 5, 7, text_len=4, text_first=True)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("once", "fresh", "arguments"),
    [
        (raster_once, raster_order, (16,)),
        (tiles_once, tile_order, ((1, 4, 4),)),
        (curve_once, curve_order, (16,)),
        (axes_once, axis_order, ("HWF", 16)),
    ],
)
def test_an_order_made_once_is_the_fresh_one(once, fresh, arguments) -> None:
    with torch.inference_mode():
        order = once(GRID, *arguments, CPU)
    want = fresh(GRID, *arguments, device=CPU)
    assert torch.equal(order.index, want.index)
    assert torch.equal(order.offsets, want.offsets)
    assert order.is_identity == want.is_identity
    assert once(GRID, *arguments, CPU) is order
    assert not order.index.is_inference()


def test_an_order_in_use_stays_the_same_object_whatever_other_grids_come() -> None:
    order = tiles_once(GRID, (1, 4, 4), CPU)
    others = weakref.WeakSet(tiles_once(TokenGrid(1, 4, n), (1, 4, 4), CPU) for n in range(1, 40))
    assert tiles_once(GRID, (1, 4, 4), CPU) is order
    assert tiles_once(GRID, (1, 4, 4), device=CPU, even=False) is order
    assert tiles_once(GRID, (1, 4, 4), CPU, True) is not order
    gc.collect()
    assert len(others) < 39  # those that nobody holds are let go
