"""Tokens sorted by their importance, within segments of the sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.types import TokenGrid, TokenOrder


def sort_in_segments(order: TokenOrder, grid: TokenGrid, importance: Tensor, segment: int) -> TokenOrder:
    """The video's tokens sorted within each segment, the most important first; text keeps its place.

    Nothing waits for the device.

    Args:
        order: the raster order of `grid`, whose blocks the result has.
        grid: the layout of the sequence.
        importance: `[B|1, H|1, N]` of each token; among equal ones the earlier token comes first.
        segment: video tokens of a segment, counted from the first video token on.

    Returns:
        Order with `index` `[B|1, H|1, N]` int64.

    Raises:
        ValueError: a segment below 1, or an importance of another length.

    Source: PBS-Attn (arXiv 2510.21270), segmented permutation.
    """
    if segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}: 256 is the paper's")
    if importance.shape[-1] != grid.num_tokens:
        raise ValueError(f"importance must be of {grid.num_tokens} tokens, got {importance.shape[-1]}")
    video = slice(grid.video_start, grid.video_start + grid.video_len)
    falling = (-importance[..., video]).argsort(dim=-1, stable=True)
    # A second stable sort, by segment, leaves the tokens of each in the order of the first.
    by_segment = (falling // segment).argsort(dim=-1, stable=True)
    index = order.index.expand(*importance.shape[:2], -1).clone()
    index[..., video] = falling.gather(-1, by_segment) + grid.video_start
    positions = torch.arange(grid.num_tokens, device=index.device).expand_as(index)
    return order.with_tokens(index, torch.empty_like(index).scatter_(-1, index, positions))
