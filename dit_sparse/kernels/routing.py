"""Sol-Attn's routing: the key blocks that stand out in the row of a query block (arXiv 2607.24027).

`routed_plan` finds them by a map of scores; `triton_routing` has a kernel that finds them as it attends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.pooled import pooled_blocks
from dit_sparse.types import AttentionPlan, Remainder, TokenOrder

__all__ = ["Route", "deviations", "routed_plan", "row_moments"]


@dataclass(frozen=True, eq=False)
class Route:
    """What decides which blocks are kept.

    Args:
        order: of queries and keys, the same for all heads.
        forced: `[1, 1, M, M]` bool, blocks kept whatever they score.
        words: `[1, 1, M, ceil(M/32)]` int32, `pack_words(forced)`.
        counted: `[1, 1, M]` bool, key blocks whose scores make a row's mean and deviation.
        tau: how many standard deviations above its row's mean a score must be.
    """

    order: TokenOrder
    forced: Tensor
    words: Tensor
    counted: Tensor
    tau: float


def row_moments(q_means: Tensor, k_means: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scores of each query block, `[B, H, M]`, without the scores.

    mu_I = q_I . k and sigma_I^2 = q_I^T C q_I, of the mean k and the covariance C of the counted mean keys.

    Args:
        q_means, k_means: `[B, H, M, D]` block means.
        counted: as in `Route`.
    """
    weights = counted.to(k_means.dtype)[..., None]
    count = weights.sum(-2, keepdim=True).clamp_min(1)
    middle = (k_means * weights).sum(-2, keepdim=True) / count
    apart = (k_means - middle) * weights
    covariance = apart.transpose(-1, -2) @ apart / count
    variance = ((q_means @ covariance) * q_means).sum(-1)
    return (q_means * middle).sum(-1), variance.clamp_min(0.0).sqrt()


def deviations(q: Tensor, k: Tensor, route: Route) -> Tensor:
    """How many standard deviations each block's score is above the mean of its row, `[B, H, M, M]` float32.

    A score is the product of a query and a key block's means.

    Args:
        q, k: `[B, H, N, D]` in the order of `route`.
        route: its order, and which blocks count.
    """
    scores, mean, deviation = _scores(q, k, route)
    return (scores - mean[..., None]) / deviation.clamp_min(torch.finfo(scores.dtype).tiny)[..., None]


def routed_plan(q: Tensor, k: Tensor, route: Route, remainder: Remainder = "mean") -> AttentionPlan:
    """The plan that keeps what `route` says of `q, k` `[B, H, N, D]`, which stand in its order."""
    scores, mean, deviation = _scores(q, k, route)
    kept = route.forced | (scores > (mean + route.tau * deviation)[..., None])
    return AttentionPlan.from_kept(route.order, kept, remainder=remainder)


def _scores(q: Tensor, k: Tensor, route: Route) -> tuple[Tensor, Tensor, Tensor]:
    """The score of each pair of blocks, `[B, H, M, M]`, and mean and deviation of each row, `[B, H, M]`."""
    q_means, k_means = (pooled_blocks(x, route.order.offsets).float() for x in (q, k))
    return q_means @ k_means.transpose(-1, -2), *row_moments(q_means, k_means, route.counted)
