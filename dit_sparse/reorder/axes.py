"""The six axis orders of (frames, height, width), for all heads or one per head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder

AXIS_ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""The names of the six orders; the first letter is the slowest axis."""


def distinct_axis_orders(grid: TokenGrid) -> tuple[str, ...]:
    """The names of the orders that differ on `grid`: six, or two for an image, whose only frame changes nothing."""
    seen: dict[str, str] = {}
    for axes in AXIS_ORDERS:
        walked = "".join(axis for axis in axes if grid.shape["FHW".index(axis)] > 1)
        seen.setdefault(walked, axes)
    return tuple(seen.values())


def axis_order(grid: TokenGrid, axes: str, block_size: int, device: torch.device | str | None = None) -> TokenOrder:
    """The video walked with its axes nested as `axes` says, cut in blocks of `block_size`.

    Args:
        grid: the layout of the sequence.
        axes: one of `AXIS_ORDERS`, slowest axis first: "FHW" is the raster order, "HWF" makes time the fastest.
        block_size: tokens a block.
        device: where the order lies.

    Returns:
        Order with `index` `[1, 1, N]` int64.

    Raises:
        ValueError: an unknown name, or a block size below 1.

    Source: PAROAttention (arXiv 2506.16054), the candidate orders of its token reordering.
    """
    index = _video_index(grid, axes)
    return grid_order(grid, index, block_size=block_size, device=device, is_identity=axes == AXIS_ORDERS[0])


def axis_orders_per_head(
    grid: TokenGrid, axes_per_head: Sequence[str], block_size: int, device: torch.device | str | None = None
) -> TokenOrder:
    """One axis order for each head.

    Args:
        grid: the layout of the sequence.
        axes_per_head: for each of the `H` heads, one of `AXIS_ORDERS`.
        block_size: tokens a block.
        device: where the order lies.

    Returns:
        Order with `index` `[1, H, N]` int64 and `offsets` `[1, 1, M+1]` int32.

    Raises:
        ValueError: no head, an unknown name, or a block size below 1.

    Source: PAROAttention (arXiv 2506.16054), one order per layer and head.
    """
    if isinstance(axes_per_head, str) or not axes_per_head:
        raise ValueError(
            f"axes_per_head must be a list with one order per head, got {axes_per_head!r}: "
            f"give each head one of {', '.join(AXIS_ORDERS)}"
        )
    distinct = {axes: _video_index(grid, axes) for axes in axes_per_head}
    index = torch.stack([distinct[axes] for axes in axes_per_head])
    return grid_order(grid, index, block_size=block_size, device=device, is_identity=set(distinct) == {AXIS_ORDERS[0]})


def _video_index(grid: TokenGrid, axes: str) -> Tensor:
    if axes not in AXIS_ORDERS:
        raise ValueError(f"axes must be one of {', '.join(AXIS_ORDERS)} (slowest axis first), got {axes!r}")
    raster = torch.arange(grid.video_len).reshape(grid.shape)
    return raster.permute(*("FHW".index(axis) for axis in axes)).flatten()
