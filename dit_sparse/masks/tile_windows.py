"""Windows that are counted in whole tiles: which tiles see each other, and how much of the attention that is."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dit_sparse.masks.neighborhood import Axes, AxisWindow
from dit_sparse.masks.select import among_text
from dit_sparse.types import TokenGrid


def tile_window(window: Axes, tile: Axes, grid: TokenGrid, blocks: int) -> Tensor:
    """`[blocks, blocks]` bool: tiles that see each other, and all text.

    Along each axis a tile sees `window` tiles around itself, moved inwards at the borders.

    Args:
        window: tiles along frames, height and width, no more than the grid has.
        tile: tokens of a tile along frames, height and width.
        grid: the layout of the sequence.
        blocks: of the grid's `tile_order` with that `tile`.

    Source: Sliding Tile Attention (arXiv 2502.04507).
    """
    f, h, w = _axes(window, tile, grid)
    video = torch.einsum("ad,be,cf->abcdef", f, h, w).flatten(3).flatten(0, 2)
    return among_text(video, grid, blocks, fill=True)


def tile_window_density(window: Axes, tile: Axes, grid: TokenGrid) -> float:
    """Share of the query-key pairs that `tile_window` keeps, text included; nothing of its size is made."""
    pairs = []
    for sees, length, size in zip(_axes(window, tile, grid), grid.shape, tile, strict=True):
        sizes = (length - torch.arange(len(sees)) * size).clamp(max=size).double()
        pairs.append(float(sizes @ sees.double() @ sizes))
    return (prod(pairs) + grid.num_tokens**2 - grid.video_len**2) / grid.num_tokens**2


def _axes(window: Axes, tile: Axes, grid: TokenGrid) -> list[Tensor]:
    """Along each axis, which tile sees which, `[T, T]` bool."""
    maps = []
    for length, size, wide in zip(grid.shape, tile, window, strict=True):
        places = torch.arange(-(-length // size))
        maps.append(AxisWindow(len(places), wide, 1, 1, causal=False).sees(places[:, None], places))
    return maps
