"""Blocks as tables of their tokens, and what is found in them: sums, maxima, the largest logit of every block pair."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.types import TokenOrder

# A CPU's caches like few rows at a time; a GPU likes few launches.
_CHUNK_SCORES = 1 << 20
_CHUNK_SCORES_GPU = 1 << 27


def block_tokens(order: TokenOrder, stride: int = 1) -> Tensor:
    """`[M, ceil(largest / stride)]` int64 positions of every `stride`-th token of each block, the first in mid-stride.

    Blocks of fewer tokens repeat their last; the row of an empty block is that of a neighbour. Nothing waits for the
    device.

    Args:
        order: an order whose blocks all heads share.
        stride: 1 takes every token.

    Raises:
        ValueError: blocks that differ between heads, or a stride below 1.
    """
    if order.offsets.shape[:2] != (1, 1):
        raise ValueError(f"order must have blocks that all heads share, got offsets {tuple(order.offsets.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}: 1 takes every token")
    start, end = order.offsets[0, 0, :-1, None].long(), order.offsets[0, 0, 1:, None].long()
    place = torch.arange(stride // 2, max(order.geometry.largest, stride // 2 + 1), stride, device=start.device)
    return (start + place).minimum(end - 1).clamp_(min=0)


def block_sums(x: Tensor, offsets: Tensor) -> Tensor:
    """Sums of `x` `[B, H, R, N]` over the blocks of its last dimension, `[B, H, R, M]` float32.

    Args:
        x: values of tokens in the order that the offsets cut.
        offsets: `[B|1, H|1, M+1]` int32 block bounds.
    """
    running = F.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
    bounds = offsets[..., None, :].long().expand(*x.shape[:-1], offsets.shape[-1])
    return running.gather(-1, bounds).diff(dim=-1).float()


def block_maxima(x: Tensor, order: TokenOrder) -> Tensor:
    """Largest of `x` `[..., N]` in each block of its last dimension, `[..., M]`; -inf for an empty block.

    Args:
        x: values of tokens in the order's positions.
        order: an order whose blocks all heads share.
    """
    tokens = block_tokens(order)
    # Where every block is as large, the table is the sequence itself.
    found = x if tokens.numel() == x.shape[-1] else x.index_select(-1, tokens.flatten())
    return found.unflatten(-1, tokens.shape).amax(-1).masked_fill(order.block_sizes[0, 0] == 0, float("-inf"))


def block_extremes(x: Tensor, order: TokenOrder, page: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every channel in each run of `page` tokens of each block.

    Args:
        x: `[B, H, N, D]` in the order's positions.
        order: an order whose blocks all heads share.
        page: tokens of a run, at least 1; the last of a block may be shorter.

    Returns:
        Two `[B, H, M, ceil(largest / page), D]` float32. Runs that a small block lacks repeat its last token.
    """
    tokens = block_tokens(order)
    short = -tokens.shape[1] % page
    tokens = torch.cat([tokens, tokens[:, -1:].expand(-1, short)], 1)
    found = x.index_select(2, tokens.flatten()).unflatten(2, (len(tokens), -1, page))
    least, most = found.aminmax(dim=4)
    return least.float(), most.float()


@torch.no_grad()
def peak_logits(
    q: Tensor,
    k: Tensor,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    *,
    stride: int = 1,
    scale: float | None = None,
    reference: Tensor | None = None,
) -> Tensor:
    """The largest `scale * q . k` of every pair of blocks, a few rows of scores at a time.

    Args:
        q, k: `[B, H, N, D]`, in the orders' positions.
        q_order, kv_order: orders whose blocks all heads share.
        stride: reads every n-th query of a block.
        scale: of the logits; `D ** -0.5` by default.
        reference: `[Mq, Mk]` bool, no row empty. Logits then count from the query's own largest one in these blocks,
            before the largest of the block is taken.

    Returns:
        `[B, H, Mq, Mk]` float32; -inf for an empty block.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rows = block_tokens(q_order, stride)
    out = torch.empty(*q.shape[:2], len(rows), kv_order.num_blocks, device=q.device)
    scores = _CHUNK_SCORES if q.device.type == "cpu" else _CHUNK_SCORES_GPU
    step = max(1, scores // (rows.shape[1] * k.shape[2]))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys = k[b, h].float().t()
            for first in range(0, len(rows), step):
                part = rows[first : first + step]
                logits = (q[b, h].index_select(0, part.flatten()).float() * scale) @ keys
                peaks = block_maxima(logits, kv_order).unflatten(0, part.shape)
                if reference is not None:
                    inside = reference[first : first + step, None]
                    peaks = peaks - peaks.masked_fill(~inside, float("-inf")).amax(-1, keepdim=True)
                out[b, h, first : first + step] = peaks.amax(1)
    return out.masked_fill_((q_order.block_sizes[0, 0] == 0)[:, None], float("-inf"))
