"""Morton order: the video by the interleaved bits of its coordinates."""

from __future__ import annotations

import torch

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder


def morton_order(grid: TokenGrid, block_size: int, device: torch.device | str | None = None) -> TokenOrder:
    """The video along a Morton (Z) curve, cut in blocks of `block_size`; a grid of any size is sorted by its numbers.

    The lowest bits are those of width, height and frame in turn. Unlike along `curve_order`, tokens that follow each
    other may lie far apart.

    Args:
        grid: the layout of the sequence.
        block_size: tokens a block.
        device: where the order lies.

    Returns:
        Order with `index` `[1, 1, N]` int64.

    Raises:
        ValueError: a block size below 1.

    Source: Morton, "A Computer Oriented Geodetic Data Base and a New Technique in File Sequencing" (1966); the token
    order of Sol-Attn (arXiv 2607.24027).
    """
    number = torch.zeros(grid.shape, dtype=torch.int64)
    for place, axis in enumerate((2, 1, 0)):
        along = torch.arange(grid.shape[axis])
        spread = torch.stack([(along >> bit & 1) << (3 * bit + place) for bit in range(grid.shape[axis].bit_length())])
        number += spread.sum(0).reshape([-1 if a == axis else 1 for a in range(3)])
    return grid_order(grid, number.flatten().argsort(), block_size=block_size, device=device)
