"""Larger blocks of the same order: so that queries may be cut more coarsely than keys."""

from __future__ import annotations

import torch

from dit_sparse.types import TokenGrid, TokenOrder


def merge_blocks(order: TokenOrder, grid: TokenGrid, count: int) -> TokenOrder:
    """`order` with `count` neighbouring blocks of video made one; text stays in its own blocks, apart from video.

    Args:
        order: of `grid`, with blocks that all heads share and none that holds text and video.
        grid: the layout of the sequence.
        count: blocks to a new one, at least 1; the last may be made of fewer.

    Returns:
        Order with the `index` and `inverse` of `order`, the same tensors.

    Raises:
        ValueError: a count below 1, or blocks that heads do not share.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: 1 leaves the blocks as they are")
    if order.offsets.shape[:2] != (1, 1):
        raise ValueError(f"offsets must be [1, 1, M+1] to merge blocks, got {tuple(order.offsets.shape)}: share them")
    if count == 1:
        return order
    bounds = order.offsets[0, 0].cpu()
    first, last = (int((bounds < end).sum()) for end in (grid.video_start, grid.video_start + grid.video_len))
    numbers = torch.arange(len(bounds))
    inside = (numbers > first) & (numbers < last)
    offsets = bounds[~inside | ((numbers - first) % count == 0)]
    return TokenOrder(order.index, order.inverse, offsets.to(order.offsets.device)[None, None], order.is_identity)
