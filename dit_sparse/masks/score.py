"""Block scores: how much each query block is expected to attend to each key block."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks.select import text_blocks
from dit_sparse.types import TokenGrid, TokenOrder


def pooled_scores(
    q: Tensor, k: Tensor, q_order: TokenOrder, kv_order: TokenOrder, scale: float | None = None
) -> Tensor:
    """Share of attention that each key block is expected to get, from mean-pooled queries and keys.

    `softmax over j of (scale * mean(q of block i) . mean(k of block j) + ln B_j)`, where `B_j` is the size of block j:
    a block counts for as many tokens as it holds, so that uneven blocks compare.

    Args:
        q, k: `[B, H, N, D]`, in the orders' positions (already permuted).
        q_order, kv_order: the orders, of which only the blocks are used.
        scale: of the logits; `D ** -0.5` by default.

    Returns:
        `[B, H, Mq, Mk]` float32, each row summing to 1; empty key blocks get 0.

    Source: block means as in SpargeAttn (arXiv 2502.18137), weighted by block size as in SVG2 (arXiv 2505.18875).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_means = pooled_blocks(q, q_order.offsets).float()
    k_means = pooled_blocks(k, kv_order.offsets).float()
    logits = scale * (q_means @ k_means.transpose(-1, -2))
    sizes = kv_order.block_sizes[..., None, :]
    # The mean of an empty block may be anything; its log-size of -inf must win.
    logits = (logits + sizes.log()).masked_fill(sizes == 0, float("-inf"))
    return logits.softmax(dim=-1)


@torch.no_grad()
def sampled_weights(q: Tensor, k: Tensor, rows: Tensor, scale: float | None = None) -> Tensor:
    """Attention weights of a few queries, `[B, H, R, N]` float32, each row summing to 1.

    Args:
        q, k: `[B, H, N, D]`.
        rows: `[R]` int64 positions of the queries.
        scale: of the logits; `D ** -0.5` by default.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ((q.index_select(2, rows).float() * scale) @ k.float().transpose(-1, -2)).softmax(-1)


def sink_and_nearness(order: TokenOrder, grid: TokenGrid, sink: int) -> Tensor:
    """Static scores `[1, 1, M, M]` float32: the first `sink` video blocks above all, then blocks by nearness.

    Args:
        order: an order whose blocks all heads share.
        grid: the layout of the sequence.
        sink: blocks; 0 for none.
    """
    number = torch.arange(order.num_blocks, device=order.offsets.device)
    is_video = ~text_blocks(grid, order.offsets)[0, 0]
    is_sink = is_video & (is_video.cumsum(0) <= sink)
    nearness = order.num_blocks - (number[:, None] - number).abs()
    return nearness.masked_fill(is_sink, 2 * order.num_blocks)[None, None].float()
