"""Orders of a whole sequence, made of an order of its video tokens; text tokens stay where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse.types import TokenGrid, TokenOrder


def grid_order(
    grid: TokenGrid,
    video_index: Tensor,
    *,
    block_size: int,
    video_offsets: Tensor | Sequence[int] | None = None,
    device: torch.device | str | None = None,
    is_identity: bool = False,
) -> TokenOrder:
    """Order of the sequence from an order of its video tokens; text keeps its place, in blocks of its own.

    Args:
        grid: the layout of the sequence, with `V` video tokens.
        video_index: int64 `[V]`, `[H, V]` or `[B|1, H|1, V]`, a permutation of the raster numbers 0 to V - 1.
        block_size: tokens a block; the last video block and the last text block may be smaller.
        video_offsets: bounds of the video blocks, from 0 to V, as a sequence or as `[M+1]`, `[H, M+1]` or
            `[B|1, H|1, M+1]`; by default blocks of `block_size`.
        device: where the order lies; by default where `video_index` lies.
        is_identity: `video_index` is known to be the raster order.

    Raises:
        ValueError: a block size below 1, or an index or offsets that do not span the video tokens.
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}: 64 or 128 suit the kernels")
    device = torch.device(device) if device is not None else video_index.device
    index = _with_three_dims(video_index).to(device, torch.int64)
    if index.shape[-1] != grid.video_len:
        raise ValueError(
            f"video_index must hold the {grid.video_len} video tokens of grid {grid}, got {index.shape[-1]}: "
            "leave the text tokens out"
        )
    offsets = _video_offsets(grid, block_size, video_offsets).to(device)
    text = torch.arange(grid.text_start, grid.text_start + grid.text_len, device=device)
    parts = [index + grid.video_start, text.expand(*index.shape[:2], -1)]
    joined = torch.cat(parts[::-1] if grid.text_first else parts, dim=-1)
    return TokenOrder.from_index(joined, _with_text(grid, offsets, block_size), is_identity=is_identity)


def raster_order(grid: TokenGrid, block_size: int, device: torch.device | str | None = None) -> TokenOrder:
    """The sequence's own order, cut in blocks of `block_size`; text in blocks of its own.

    Returns:
        Order with `index` `[1, 1, N]` int64 and `is_identity` set.

    Raises:
        ValueError: a block size below 1.
    """
    return grid_order(grid, torch.arange(grid.video_len), block_size=block_size, device=device, is_identity=True)


def _with_three_dims(x: Tensor) -> Tensor:
    if not 1 <= x.ndim <= 3:
        raise ValueError(f"video_index and video_offsets must have 1 to 3 dimensions, got {tuple(x.shape)}")
    return x.reshape((1,) * (3 - x.ndim) + x.shape)


def _video_offsets(grid: TokenGrid, block_size: int, given: Tensor | Sequence[int] | None) -> Tensor:
    if given is None:
        return _with_three_dims(_cut(grid.video_len, block_size))
    offsets = _with_three_dims(torch.as_tensor(given, dtype=torch.int32))
    # Looking at offsets on another device would wait for it.
    if offsets.device.type == "cpu" and not _spans(offsets, grid.video_len):
        raise ValueError(
            f"video_offsets must rise from 0 to the {grid.video_len} video tokens of grid {grid}, "
            f"got {offsets[0, 0].tolist()[:8]}...: start at 0 and end at {grid.video_len}"
        )
    return offsets


def _spans(offsets: Tensor, length: int) -> bool:
    starts_and_ends = (offsets[..., 0] == 0).all() and (offsets[..., -1] == length).all()
    return bool(starts_and_ends and (offsets.diff(dim=-1) >= 0).all())


def _with_text(grid: TokenGrid, video: Tensor, block_size: int) -> Tensor:
    text = _cut(grid.text_len, block_size).to(video.device).expand(*video.shape[:2], -1)
    if grid.text_first:
        return torch.cat([text, video[..., 1:] + grid.text_len], dim=-1)
    return torch.cat([video, text[..., 1:] + grid.video_len], dim=-1)


def _cut(length: int, size: int) -> Tensor:
    """`[M+1]` int32 bounds of blocks of `size` over `length` tokens, the last one smaller."""
    return torch.arange(0, length + size, size, dtype=torch.int32).clamp_(max=length)
