"""Selections: from block scores to the blocks that are kept.

Scores are `[B, H, Mq, Mk]`, higher is better; the result is bool of the same shape. Every row keeps at least one block,
and among equal scores the earlier block wins, so the same scores always give the same blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.types import TokenGrid, TokenOrder


def top_k(scores: Tensor, k: int | Tensor) -> Tensor:
    """Keep the `k` best blocks of every row.

    Args:
        scores: `[B, H, Mq, Mk]`.
        k: how many, or one number per head, `[B|1, H|1]` integer; more than `Mk` keeps all. A tensor's numbers below 1
            count as 1.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: `k` below 1, or a tensor of another shape.
    """
    if isinstance(k, int) and k < 1:
        raise ValueError(f"k must be at least 1, got {k}: every row keeps a block")
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return _keep_ranks(scores, ranks < _per_head("k", k, scores).clamp(min=1))


def top_p(scores: Tensor, p: float | Tensor, min_kept: int = 1) -> Tensor:
    """Keep the smallest set of blocks whose share of the row's sum reaches `p`.

    Args:
        scores: `[B, H, Mq, Mk]`, not negative.
        p: the share in (0, 1], or one per head, `[B|1, H|1]`.
        min_kept: keep at least this many blocks a row; at least 1.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: `p` outside (0, 1] or `min_kept` below 1. A tensor on a GPU is not looked at.
    """
    _check_share("p", p)
    if min_kept < 1:
        raise ValueError(f"min_kept must be at least 1, got {min_kept}: every row keeps a block")
    sums = scores.double().sort(dim=-1, descending=True, stable=True).values.cumsum(-1)
    before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
    needed = before < _per_head("p", p, scores) * sums[..., -1:]
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    return _keep_ranks(scores, needed | (ranks < min_kept))


def threshold(scores: Tensor, value: float | Tensor) -> Tensor:
    """Keep the blocks that score at least `value`, and the best of each row.

    Args:
        scores: `[B, H, Mq, Mk]`.
        value: the least score kept, or one per head, `[B|1, H|1]`.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: a tensor of another shape.
    """
    return (scores >= _per_head("value", value, scores).to(scores.dtype)) | top_k(scores, 1)


def keep_text(kept: Tensor, grid: TokenGrid, q_offsets: Tensor, k_offsets: Tensor) -> Tensor:
    """`kept` with every block that holds text added, as a query and as a key.

    Args:
        kept: `[B|1, H|1, Mq, Mk]` bool.
        grid: the layout of the sequence; text keeps its positions in every order.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 bounds of the blocks.

    Returns:
        `[B|1, H|1, Mq, Mk]` bool, a new tensor.
    """
    return kept | _is_text(grid, q_offsets)[..., :, None] | _is_text(grid, k_offsets)[..., None, :]


def density_to_blocks(
    scores: Tensor, density: float | Tensor, q_order: TokenOrder, kv_order: TokenOrder, grid: TokenGrid
) -> Tensor:
    """How many video key blocks every row must keep for the density in tokens to come nearest to `density`.

    All text counts as kept. Blocks may be uneven, so the number depends on which ones the scores choose.

    Args:
        scores: `[B, H, Mq, Mk]`.
        density: the share of query-key pairs to keep, in (0, 1], or one per head, `[B|1, H|1]`.
        q_order, kv_order: the orders that the scores belong to.
        grid: the layout of the sequence.

    Returns:
        `[B, H]` int64, at least 1; of two numbers equally near, the smaller.

    Raises:
        ValueError: `density` outside (0, 1]. A tensor on a GPU is not looked at.
    """
    _check_share("density", density)
    q_sizes = _video_sizes(grid, q_order.offsets)
    k_sizes = _video_sizes(grid, kv_order.offsets)
    best_first = _video_scores(scores, grid, kv_order).argsort(dim=-1, descending=True, stable=True)
    chosen = k_sizes[..., None, :].expand(scores.shape).gather(-1, best_first).cumsum(-1)
    video_pairs = torch.einsum("bhq,bhqk->bhk", q_sizes.expand(scores.shape[:3]), chosen)
    text_pairs = grid.num_tokens**2 - grid.video_len**2
    reached = (video_pairs + text_pairs) / grid.num_tokens**2
    wanted = _per_head("density", density, scores)[..., 0]
    return (reached - wanted).abs().argmin(dim=-1) + 1


def select_density(
    scores: Tensor, density: float | Tensor, q_order: TokenOrder, kv_order: TokenOrder, grid: TokenGrid
) -> Tensor:
    """Keep all text and, in every row, equally many of the best video key blocks, so that `density` is met.

    The density in tokens, text included, is as near to `density` as whole blocks allow.

    Args:
        scores, density, q_order, kv_order, grid: as in `density_to_blocks`.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: as in `density_to_blocks`.

    Source: AdaSpa (arXiv 2502.21079): equally many blocks a row, text always kept, a budget per head.
    """
    blocks = density_to_blocks(scores, density, q_order, kv_order, grid)
    kept = top_k(_video_scores(scores, grid, kv_order), blocks)
    return keep_text(kept, grid, q_order.offsets, kv_order.offsets)


def _keep_ranks(scores: Tensor, wanted: Tensor) -> Tensor:
    """Keep the blocks whose rank in their row is `wanted`, which broadcasts to the scores' shape."""
    best_first = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best_first, wanted.expand(scores.shape))


def _per_head(name: str, value: float | Tensor, scores: Tensor) -> Tensor:
    """`value` as a tensor that broadcasts to the scores."""
    if not isinstance(value, Tensor):
        dtype = torch.int64 if isinstance(value, int) else torch.float64
        return torch.full((1, 1, 1, 1), value, dtype=dtype, device=scores.device)
    b, h = scores.shape[:2]
    if value.ndim != 2 or value.shape[0] not in (1, b) or value.shape[1] not in (1, h):
        raise ValueError(
            f"{name} must be a number or one per head, [{b}|1, {h}|1], got {tuple(value.shape)}: reshape it"
        )
    return value.to(scores.device)[..., None, None]


def _check_share(name: str, share: float | Tensor) -> None:
    if isinstance(share, Tensor):
        # Looking at a tensor on another device would wait for it.
        valid = share.device.type != "cpu" or bool(((share > 0) & (share <= 1)).all())
    else:
        valid = 0 < share <= 1
    if not valid:
        raise ValueError(f"{name} must be above 0 and at most 1, got {share}: 0.25 keeps a quarter")


def _is_text(grid: TokenGrid, offsets: Tensor) -> Tensor:
    """`[B|1, H|1, M]` bool: blocks that hold text tokens."""
    start, end = offsets[..., :-1], offsets[..., 1:]
    return (start < grid.text_start + grid.text_len) & (end > grid.text_start) & (start < end)


def _video_sizes(grid: TokenGrid, offsets: Tensor) -> Tensor:
    """`[B|1, H|1, M]` float64 tokens a block, 0 for text blocks."""
    return offsets.diff(dim=-1).double().masked_fill(_is_text(grid, offsets), 0.0)


def _video_scores(scores: Tensor, grid: TokenGrid, kv_order: TokenOrder) -> Tensor:
    """Scores that rank text blocks last."""
    return scores.masked_fill(_is_text(grid, kv_order.offsets)[..., None, :], float("-inf"))
