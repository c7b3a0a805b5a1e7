"""How well a token order gathers attention into blocks: the two metrics by which PAROAttention compares orders.

The attention map exists only for one block of queries and a few heads at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_sparse.reorder import Block, axis_order, block_tokens
from dit_sparse.types import TokenGrid

_CHUNK_SCORES = 1 << 24


def order_metrics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grid: TokenGrid,
    *,
    block: int,
    sigma: float = 0.99,
    epsilon: float | None = None,
    sample_blocks: int = 16,
) -> Tensor:
    """M_sparse and M_quant of each head's attention map, whose tokens stand in some order already.

    M_sparse is the share of blocks of which at least `sigma` of the weights are below `epsilon`: higher is better.
    M_quant is the mean over blocks of their largest weight over their mean weight: lower is better. Text and a ragged
    last block stay out.

    Args:
        q, k: `[B, H, N, D]` in the order's positions.
        lse: `[B, H, N]` natural-log row sums of the dense attention, in the same positions.
        grid: the layout of the sequence.
        block: tokens a block.
        sigma, epsilon: as above; by default `epsilon` is the mean weight, 1 / N.
        sample_blocks: query blocks that are looked at, evenly spread; all key blocks are.

    Returns:
        `[H, 2]` float64, means over the batch.

    Source: PAROAttention (arXiv 2506.16054), section 4.1.
    Differs from the paper: `sample_blocks` query blocks instead of all; the paper has 0.9 and 1e-3 for `sigma` and
    `epsilon`, with which blocks of a few scattered large weights count as sparse (docs/methods/paro.md).
    """
    epsilon = 1 / grid.num_tokens if epsilon is None else epsilon
    start, size = grid.video_start, min(block, grid.video_len)
    blocks = grid.video_len // size
    rows = torch.linspace(0, blocks - 1, min(sample_blocks, blocks)).round().long().unique().tolist()
    k = k[:, :, start : start + blocks * size]
    sums = torch.zeros(q.shape[1], 2, dtype=torch.float64, device=q.device)
    step = max(1, _CHUNK_SCORES // (q.shape[0] * size * k.shape[2]))
    for head in range(0, q.shape[1], step):
        heads = slice(head, head + step)
        keys = k[:, heads].float().transpose(-1, -2)
        for row in rows:
            tokens = slice(start + row * size, start + (row + 1) * size)
            scores = (q[:, heads, tokens].float() * q.shape[-1] ** -0.5) @ keys
            weights = (scores - lse[:, heads, tokens, None]).exp_().unflatten(-1, (blocks, size))
            sums[heads] += _of_row(weights, sigma, epsilon)
    return sums / len(rows)


def _of_row(weights: Tensor, sigma: float, epsilon: float) -> Tensor:
    """`[H, 2]` float64 metrics of one row of blocks, `weights` `[B, H, size, blocks, size]`."""
    small = (weights < epsilon).sum((2, 4))
    sparse = small >= sigma * weights.shape[2] * weights.shape[4]
    peak, mean = weights.amax((2, 4)), weights.mean((2, 4))
    # A block whose weights have all underflowed is even, not undefined.
    spread = torch.where(mean > 0, peak / mean, 1.0)
    return torch.stack([sparse.double().mean((0, 2)), spread.double().mean((0, 2))], -1)


def metrics_by_order(
    q: Tensor, k: Tensor, lse: Tensor, grid: TokenGrid, orders: Sequence[str], *, block: Block, **options: Any
) -> Tensor:
    """`order_metrics` of `q, k, lse` in the sequence's own order under each of the axis `orders`, `[H, O, 2]`."""
    metrics, options = [], options | {"block": block_tokens(block)}
    for axes in orders:
        order = axis_order(grid, axes, block, device=q.device)
        metrics.append(order_metrics(order.permute(q), order.permute(k), order.permute(lse), grid, **options))
    return torch.stack(metrics, 1)


def best_orders(metrics: Tensor, alpha: float) -> Tensor:
    """The order of least cost of each head, `[H]` int64.

    The cost is `alpha * s / sum(s) + (1 - alpha) * m / sum(m)` with s = 1 - M_sparse and m = M_quant, the sums over the
    candidates, so that unlike metrics can be added.

    Args:
        metrics: `[H, O, 2]`, M_sparse and M_quant of each candidate.
        alpha: weight of sparsity against quantisation incoherence.

    Source: PAROAttention (arXiv 2506.16054), section 4.1.
    Differs from the paper: as printed it minimises M_sparse itself; `alpha` is not reported there.
    """
    dispersion, incoherence = 1 - metrics[..., 0], metrics[..., 1]
    return (alpha * _share(dispersion) + (1 - alpha) * _share(incoherence)).argmin(-1)


def _share(cost: Tensor) -> Tensor:
    return cost / cost.sum(-1, keepdim=True).clamp_min(1e-12)
