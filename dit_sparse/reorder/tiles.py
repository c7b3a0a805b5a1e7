"""Tile order: the video cut into 3-D tiles, one tile a block."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder


def tile_order(
    grid: TokenGrid,
    tile: tuple[int, int, int] = (2, 8, 8),
    device: torch.device | str | None = None,
    *,
    even: bool = False,
) -> TokenOrder:
    """The video cut into 3-D tiles, one tile a block, tiles and the tokens inside each in raster order.

    Args:
        grid: the layout of the sequence; where a size is no multiple of the tile's, border tiles are smaller.
        tile: tokens of a tile along frames, height and width. Text is cut in blocks of the same volume.
        device: where the order lies.
        even: whether the smaller tiles at the border stand after all others and their tokens, tile by tile, are cut in
            blocks of a tile's volume. Then all blocks but the last are full, which is fastest for kernels; the windows
            of `masks` want one tile a block, in raster order.

    Returns:
        Order with `index` `[1, 1, N]` int64, none of its blocks empty.

    Raises:
        ValueError: a tile that is not three positive sizes.

    Source: Generalized Neighborhood Attention (arXiv 2504.16922), token permutation by multi-dimensional tiles.
    Differs from the paper: the video is not padded to whole tiles.
    """
    if len(tile) != 3 or min(tile) < 1:
        raise ValueError(f"tile must be three sizes of at least 1 (frames, height, width), got {tile}")
    if even:
        return grid_order(grid, even_tile_walk(grid.shape, tile), block_size=prod(tile), device=device)
    tile_of = _tile_of_token(grid.shape, tile)
    # A stable sort leaves the tokens of one tile in raster order.
    index = tile_of.argsort(stable=True)
    offsets = torch.nn.functional.pad(tile_of.bincount().cumsum(0), (1, 0))
    return grid_order(grid, index, block_size=prod(tile), video_offsets=offsets, device=device)


def even_tile_walk(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """`[V]` int64 raster numbers of the tokens of a video of `shape`, tile by tile, whole tiles before smaller ones."""
    tile_of = _tile_of_token(shape, tile)
    is_smaller = tile_of.bincount() < prod(tile)
    rank = is_smaller.long().argsort(stable=True).argsort()
    return rank[tile_of].argsort(stable=True)


def _tile_of_token(shape: tuple[int, int, int], tile: tuple[int, int, int]) -> Tensor:
    """`[V]` int64 number of the tile that each video token lies in."""
    number = torch.zeros(1, 1, 1, dtype=torch.int64)
    for axis, (length, size) in enumerate(zip(shape, tile, strict=True)):
        along = torch.arange(length) // size
        number = number * -(-length // size) + along.reshape([-1 if a == axis else 1 for a in range(3)])
    return number.flatten()
