"""The six axis orders of (frames, height, width), for all heads or one per head, cut in runs or in tiles."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dit_sparse.reorder.grid import grid_order
from dit_sparse.reorder.tiles import even_tile_walk
from dit_sparse.types import TokenGrid, TokenOrder

AXIS_ORDERS = ("FHW", "FWH", "HFW", "HWF", "WFH", "WHF")
"""The names of the six orders; the first letter is the slowest axis."""

Block = int | tuple[int, int, int]
"""How an axis order is cut: tokens of a run, or the sides of a tile along its slowest, middle and fastest axis."""


def distinct_axis_orders(grid: TokenGrid, block: Block = 1) -> tuple[str, ...]:
    """The names of the orders that differ on `grid`.

    Six, or two for an image, whose only frame changes nothing. Cut in tiles, orders differ by what tiles they make,
    however these are walked: six for unlike sides, three where two are equal, one for a cube. Where a side is longer
    than the grid, several tiles make a block, and the walk counts too.
    """
    seen: dict[object, str] = {}
    for axes in AXIS_ORDERS:
        walked = "".join(axis for axis in axes if grid.shape["FHW".index(axis)] > 1)
        if isinstance(block, int):
            seen.setdefault(walked, axes)
            continue
        sides = tile_along(grid, axes, block)
        # Where tiles are smaller than a block, those that follow each other share one, so that their walk counts.
        seen.setdefault(sides if prod(sides) == prod(block) else (sides, walked), axes)
    return tuple(seen.values())


def tile_along(grid: TokenGrid, axes: str, tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """Sides along frames, height and width of a `tile` whose sides are along `axes`; none is longer than the grid."""
    sides = dict(zip(axes, tile, strict=True))
    return min(sides["F"], grid.frames), min(sides["H"], grid.height), min(sides["W"], grid.width)


def axis_order(grid: TokenGrid, axes: str, block: Block, device: torch.device | str | None = None) -> TokenOrder:
    """The video walked with its axes nested as `axes` says, cut in runs or in tiles.

    Tiles, and the tokens of each, are walked in the same nesting. As with `tile_order(..., even=True)`, smaller tiles
    at the border stand last, and all blocks but the last are full.

    Args:
        grid: the layout of the sequence.
        axes: one of `AXIS_ORDERS`, slowest axis first: "FHW" is the raster order, "HWF" makes time the fastest.
        block: tokens a block, or the sides of a tile along the slowest, middle and fastest axis.
        device: where the order lies.

    Returns:
        Order with `index` `[1, 1, N]` int64.

    Raises:
        ValueError: an unknown name, or a block or a side below 1.

    Source: PAROAttention (arXiv 2506.16054), the candidate orders of its token reordering; tiles are ours.
    """
    return _order(grid, _video_index(grid, axes, block), block, device, _is_raster({axes}, block))


def axis_orders_per_head(
    grid: TokenGrid, axes_per_head: Sequence[str], block: Block, device: torch.device | str | None = None
) -> TokenOrder:
    """One axis order for each head.

    Args:
        grid: the layout of the sequence.
        axes_per_head: for each of the `H` heads, one of `AXIS_ORDERS`.
        block: tokens a block, or the sides of a tile along each head's slowest, middle and fastest axis.
        device: where the order lies.

    Returns:
        Order with `index` `[1, H, N]` int64 and `offsets` `[1, 1, M+1]` int32.

    Raises:
        ValueError: no head, an unknown name, or a block or a side below 1.

    Source: PAROAttention (arXiv 2506.16054), one order per layer and head; tiles are ours.
    """
    if isinstance(axes_per_head, str) or not axes_per_head:
        raise ValueError(
            f"axes_per_head must be a list with one order per head, got {axes_per_head!r}: "
            f"give each head one of {', '.join(AXIS_ORDERS)}"
        )
    distinct = {axes: _video_index(grid, axes, block) for axes in axes_per_head}
    index = torch.stack([distinct[axes] for axes in axes_per_head])
    return _order(grid, index, block, device, _is_raster(set(distinct), block))


def block_tokens(block: Block) -> int:
    """Tokens of a full block."""
    return block if isinstance(block, int) else prod(block)


def _order(
    grid: TokenGrid, index: Tensor, block: Block, device: torch.device | str | None, is_identity: bool
) -> TokenOrder:
    return grid_order(grid, index, block_size=block_tokens(block), device=device, is_identity=is_identity)


def _is_raster(axes: set[str], block: Block) -> bool:
    return axes == {AXIS_ORDERS[0]} and isinstance(block, int)


def _video_index(grid: TokenGrid, axes: str, block: Block) -> Tensor:
    if axes not in AXIS_ORDERS:
        raise ValueError(f"axes must be one of {', '.join(AXIS_ORDERS)} (slowest axis first), got {axes!r}")
    if not isinstance(block, int) and (len(block) != 3 or min(block) < 1):
        raise ValueError(
            f"block must be a number of tokens or three sides of at least 1, got {block}: (4, 4, 4) is a tile of 64"
        )
    raster = torch.arange(grid.video_len).reshape(grid.shape)
    walked = raster.permute(*("FHW".index(axis) for axis in axes))
    if isinstance(block, int):
        return walked.flatten()
    f, h, w = walked.shape
    return walked.flatten()[even_tile_walk((f, h, w), block)]
