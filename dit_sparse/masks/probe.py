"""Probe rows: what a few queries lose under a mask, to choose between masks for each head."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.types import TokenGrid, TokenOrder


@lru_cache(maxsize=16)
def probe_rows(grid: TokenGrid, count: int, device: torch.device) -> Tensor:
    """`[min(count, V)]` int64 token numbers of video queries, one at random in each of as many equal stretches.

    The same at every call, so that a run can be repeated.

    Raises:
        ValueError: a count below 1.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}: 64 is usual")
    with torch.inference_mode(False):
        count = min(count, grid.video_len)
        starts = torch.arange(count + 1) * grid.video_len // count
        place = torch.rand(count, generator=torch.Generator().manual_seed(0))
        rows = starts[:-1] + (place * starts.diff()).long()
        return (rows + grid.video_start).to(device)


def mask_rows(kept: Tensor, order: TokenOrder, rows: Tensor) -> Tensor:
    """`[R, N]` bool: which keys the queries `rows` see under the blocks `kept`, tokens in the sequence's own order.

    Args:
        kept: `[M, M]` bool.
        order: an order that all heads share, `[1, 1, N]`.
        rows: `[R]` int64 token numbers.
    """
    block = BlockMask.block_of(order.offsets)[0, 0][order.inverse[0, 0]]
    return kept[block[rows]][:, block]


def masked_errors(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """Mean squared error of attention's output for the queries `rows` under each of `masks`, against dense attention.

    Args:
        q, k, v: `[B, H, N, D]`.
        rows: `[R]` int64 token numbers.
        masks: `[S, R, N]` bool, no row empty.

    Returns:
        `[S, B, H]` float32.

    Source: the online profiling of Sparse VideoGen (arXiv 2502.01776).
    """
    queries = q.index_select(2, rows)
    dense = F.scaled_dot_product_attention(queries, k, v)
    sparse = (F.scaled_dot_product_attention(queries, k, v, attn_mask=mask) for mask in masks)
    return torch.stack([(out.float() - dense.float()).square().mean((-1, -2)) for out in sparse])
