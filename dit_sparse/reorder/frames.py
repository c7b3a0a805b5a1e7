"""The raster order in blocks that share a frame equally."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder


def frame_order(grid: TokenGrid, block_size: int, device: torch.device | str | None = None) -> TokenOrder:
    """The sequence's own order, in blocks of at most `block_size` that share their frame equally.

    Args:
        grid: the layout of the sequence.
        block_size: most tokens a block.
        device: where the order lies.

    Returns:
        Order with `index` `[1, 1, N]` int64 and `is_identity` set.

    Raises:
        ValueError: a block size below 1.

    Source: Radial Attention (arXiv 2506.19852), whose bands follow frames.
    """
    bounds = frame_bounds(grid, block_size)
    starts = (torch.arange(grid.frames)[:, None] * grid.height * grid.width + bounds[:-1]).flatten()
    offsets = F.pad(starts, (0, 1), value=grid.video_len)
    index = torch.arange(grid.video_len)
    return grid_order(grid, index, block_size=block_size, video_offsets=offsets, device=device, is_identity=True)


def frame_bounds(grid: TokenGrid, block_size: int) -> Tensor:
    """Bounds `[m+1]` int64 of the blocks of one frame."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}: 64 or 128 suit the kernels")
    tokens = grid.height * grid.width
    blocks = -(-tokens // block_size)
    return torch.arange(blocks + 1) * tokens // blocks
