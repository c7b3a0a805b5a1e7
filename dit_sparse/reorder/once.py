"""Orders made once a grid, so that what kernels and selections have read back from the device stays known.

An order in use stays the one order of its grid: a plan that outlives a run must find its own in the next.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec

import torch

from dit_sparse.reorder.axes import Block, axis_order
from dit_sparse.reorder.curve import curve_order
from dit_sparse.reorder.frames import frame_order
from dit_sparse.reorder.grid import raster_order
from dit_sparse.reorder.merge import merge_blocks
from dit_sparse.reorder.morton import morton_order
from dit_sparse.reorder.tiles import tile_order
from dit_sparse.types import TokenGrid, TokenOrder

_P = ParamSpec("_P")


def _once(make: Callable[_P, TokenOrder]) -> Callable[_P, TokenOrder]:
    """`make`, of which the last 16 orders are remembered, and all others for as long as somebody holds them."""
    signature = inspect.signature(make)
    held: weakref.WeakValueDictionary[tuple[Any, ...], TokenOrder] = weakref.WeakValueDictionary()

    @lru_cache(maxsize=16)
    @wraps(make)
    def made(*args: _P.args, **options: _P.kwargs) -> TokenOrder:
        given = signature.bind(*args, **options)
        given.apply_defaults()
        # Tensors made in inference mode could not be used where gradients are recorded.
        with torch.inference_mode(False):
            return held.get(given.args) or held.setdefault(given.args, make(*args, **options))

    return made  # type: ignore[return-value]


@_once
def raster_once(grid: TokenGrid, block: int, device: torch.device) -> TokenOrder:
    """`raster_order`, always the same object."""
    return raster_order(grid, block, device=device)


@_once
def tiles_once(grid: TokenGrid, tile: tuple[int, int, int], device: torch.device, even: bool = False) -> TokenOrder:
    """`tile_order`, always the same object."""
    return tile_order(grid, tile, device=device, even=even)


@_once
def curve_once(grid: TokenGrid, block: int, device: torch.device) -> TokenOrder:
    """`curve_order`, always the same object."""
    return curve_order(grid, block, device=device)


@_once
def axes_once(grid: TokenGrid, axes: str, block: Block, device: torch.device) -> TokenOrder:
    """`axis_order`, always the same object."""
    return axis_order(grid, axes, block, device=device)


@_once
def frames_once(grid: TokenGrid, block: int, device: torch.device) -> TokenOrder:
    """`frame_order`, always the same object."""
    return frame_order(grid, block, device=device)


@_once
def morton_once(grid: TokenGrid, block: int, device: torch.device) -> TokenOrder:
    """`morton_order`, always the same object."""
    return morton_order(grid, block, device=device)


_merged: weakref.WeakKeyDictionary[TokenOrder, dict[tuple[TokenGrid, int], TokenOrder]] = weakref.WeakKeyDictionary()


def merged_once(order: TokenOrder, grid: TokenGrid, count: int) -> TokenOrder:
    """`merge_blocks`, the same object as long as `order` lives: both are of the same tokens, whatever is forgotten."""
    if count == 1:
        return order
    known = _merged.setdefault(order, {})
    if (grid, count) not in known:
        with torch.inference_mode(False):
            known[grid, count] = merge_blocks(order, grid, count)
    return known[grid, count]
