"""Block scores: how much each query block is expected to attend to each key block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.types import TokenOrder


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


def self_similarity(x: Tensor, order: TokenOrder) -> Tensor:
    """Mean cosine between every two tokens of a block, themselves included: how well their mean stands for them.

    Args:
        x: `[B, H, N, D]`, in the order's positions.
        order: the order, of which only the blocks are used.

    Returns:
        `[B, H, M]` float32, from 0 to 1; 0 for an empty block.

    Source: CosSim of SpargeAttn (arXiv 2502.18137), section 3.3.
    """
    # The mean of all products of unit vectors is the square of their mean.
    return pooled_blocks(F.normalize(x.float(), dim=-1), order.offsets).square().sum(-1)
