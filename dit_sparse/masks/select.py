"""Selections: from block scores to the blocks that are kept.

Scores are `[B, H, Mq, Mk]`, higher is better; the result is bool of the same shape. Every row keeps at least one block,
and among equal scores the earlier block wins, so the same scores always give the same blocks.
"""

from __future__ import annotations

import weakref
from collections import Counter
from functools import cached_property

import torch
from torch import Tensor

from dit_sparse.kernels import keep_best
from dit_sparse.kernels.keep_best import keep_ranks, takes_kernel
from dit_sparse.types import TokenGrid, TokenOrder

# A rank is a pass over the scores; from about this many on, a sort costs less.
_FEW_BLOCKS = 16


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
    return keep_best(scores, _per_head("k", k, scores)[..., 0, 0])


def top_p(scores: Tensor, p: float | Tensor, min_kept: int = 1, max_kept: int | None = None) -> Tensor:
    """Keep the smallest set of blocks whose share of the row's sum reaches `p`.

    Args:
        scores: `[B, H, Mq, Mk]`, not negative.
        p: the share in (0, 1], or one per head, `[B|1, H|1]`.
        min_kept: keep at least this many blocks a row; at least 1.
        max_kept: keep at most this many, whatever their share; `None` for any number.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Raises:
        ValueError: `p` outside (0, 1], `min_kept` below 1 or above `max_kept`. A tensor on a GPU is not looked at.
    """
    _check_share("p", p)
    if min_kept < 1:
        raise ValueError(f"min_kept must be at least 1, got {min_kept}: every row keeps a block")
    if max_kept is not None and max_kept < min_kept:
        raise ValueError(f"max_kept must be at least min_kept, {min_kept}, got {max_kept}")
    in_order, best_first = scores.double().sort(dim=-1, descending=True, stable=True)
    sums = in_order.cumsum(-1)
    before = torch.nn.functional.pad(sums[..., :-1], (1, 0))
    needed = before < _per_head("p", p, scores) * sums[..., -1:]
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    wanted = needed | (ranks < min_kept)
    return keep_ranks(best_first, wanted if max_kept is None else wanted & (ranks < max_kept))


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


def fill_budget(kept: Tensor, scores: Tensor, sizes: Tensor, budget: Tensor) -> Tensor:
    """`kept` and the best of the other blocks of every row, until the keys of the row reach its budget.

    The block that crosses the budget is kept.

    Args:
        kept: `[B, H, Mq, Mk]` bool, no row empty.
        scores: `[B, H, Mq, Mk]`; blocks of -inf are not taken.
        sizes: `[B|1, H|1, Mk]` keys a block.
        budget: `[B, H, Mq]` keys a row.

    Returns:
        `[B, H, Mq, Mk]` bool.

    Source: the greedy choice of SVG-EAR (arXiv 2603.08982).
    """
    sizes = sizes[..., None, :].double()
    left = budget.double() - (kept * sizes).sum(-1)
    ranked, best_first = scores.masked_fill(kept, float("-inf")).sort(dim=-1, descending=True, stable=True)
    spent = sizes.expand(scores.shape).gather(-1, best_first)
    wanted = (spent.cumsum(-1) - spent < left[..., None]) & ~ranked.isneginf()
    return kept | keep_ranks(best_first, wanted)


def keep_text(kept: Tensor, grid: TokenGrid, q_offsets: Tensor, k_offsets: Tensor) -> Tensor:
    """`kept` with every block that holds text added, as a query and as a key.

    Args:
        kept: `[B|1, H|1, Mq, Mk]` bool.
        grid: the layout of the sequence; text keeps its positions in every order.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 bounds of the blocks.

    Returns:
        `[B|1, H|1, Mq, Mk]` bool, a new tensor.
    """
    return kept | text_blocks(grid, q_offsets)[..., :, None] | text_blocks(grid, k_offsets)[..., None, :]


def without_text(scores: Tensor, grid: TokenGrid, k_offsets: Tensor) -> Tensor:
    """`scores` `[B, H, Mq, Mk]` with 0 for key blocks of text, which are kept anyhow and take no share."""
    return scores.masked_fill(text_blocks(grid, k_offsets)[..., None, :], 0.0)


def among_text(video: Tensor, grid: TokenGrid, blocks: int, fill: bool | float = 0) -> Tensor:
    """A map of the video's blocks, `[..., m, m]`, as one of all `blocks`, with `fill` where text is a query or key."""
    text = blocks - video.shape[-1]
    before = text if grid.text_first else 0
    return torch.nn.functional.pad(video, (before, text - before, before, text - before), value=fill)


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
    return Ranking(scores, q_order, kv_order, grid).blocks(density)


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
    _check_share("density", density)
    return Ranking(scores, q_order, kv_order, grid).select(density)


def blocks_a_row(grid: TokenGrid, density: float, blocks: int) -> int:
    """How many of `blocks` even video blocks a row keeps at `density` of all pairs, all text kept; at least 1."""
    dropped = (1 - density) * grid.num_tokens**2 / grid.video_len**2
    return max(1, round((1 - dropped) * blocks))


def blocks_for_share(scores: Tensor, p: float) -> Tensor:
    """How many of a row's best blocks reach the share `p` of its sum, `[B, H, Mq]` int64, at least 1.

    Args:
        scores: `[B, H, Mq, Mk]`, not negative.
        p: the share in (0, 1].

    Raises:
        ValueError: `p` outside (0, 1].
    """
    _check_share("p", p)
    sums = scores.double().sort(dim=-1, descending=True).values.cumsum(-1)
    return (sums < p * sums[..., -1:]).sum(-1).clamp(max=scores.shape[-1] - 1) + 1


def share_out(needs: Tensor, density: float) -> Tensor:
    """Densities `[B, H]` float64 in proportion to the heads' `needs`, with mean `density` and none above 1.

    Args:
        needs: `[B, H]`, above 0.
        density: their mean, in (0, 1].
    """
    needs = needs.double()
    result = torch.zeros_like(needs)
    # What a full head cannot take goes to the others; every round that is not the last fills at least one.
    for _ in range(needs.shape[1]):
        full = result >= 1
        left = density * needs.shape[1] - full.sum(1, keepdim=True)
        factor = left / needs.masked_fill(full, 0).sum(1, keepdim=True).clamp(min=1e-12)
        result = (needs * factor).masked_fill(full, 1).clamp_max(1)
    return result


class Ranking:
    """The blocks of one call in the order of their scores, from which selections of any density are made.

    What the densities cost is worked out once, so that a second selection from the same scores is cheap. On a GPU
    nothing waits for the device after the first call with an order.

    Args:
        scores, q_order, kv_order, grid: as in `density_to_blocks`.
    """

    def __init__(self, scores: Tensor, q_order: TokenOrder, kv_order: TokenOrder, grid: TokenGrid) -> None:
        self._orders = q_order, kv_order
        self._grid = grid
        # Text blocks rank last.
        self._scores = scores.masked_fill(text_blocks(grid, kv_order.offsets)[..., None, :], float("-inf"))

    def blocks(self, density: float | Tensor) -> Tensor:
        """What `density_to_blocks` returns; `density` itself is not checked."""
        wanted = _per_head("density", density, self._scores)[..., 0]
        return (self._reached - wanted).abs().argmin(dim=-1) + 1

    def select(self, density: float | Tensor) -> Tensor:
        """What `select_density` returns; `density` itself is not checked."""
        blocks = self.blocks(density)
        if takes_kernel(self._scores, "auto"):
            kept = keep_best(self._scores, blocks)
        else:
            ranks = torch.arange(self._scores.shape[-1], device=self._scores.device)
            kept = keep_ranks(self._best_first, ranks < blocks[..., None, None])
        return keep_text(kept, self._grid, *(order.offsets for order in self._orders))

    @cached_property
    def _best_first(self) -> Tensor:
        return self._scores.argsort(dim=-1, descending=True, stable=True)

    @cached_property
    def _reached(self) -> Tensor:
        """`[B, H, Mk]` float64: the density in tokens with 1 to `Mk` blocks a row."""
        q_sizes = _video_sizes(self._grid, self._orders[0].offsets).expand(self._scores.shape[:3])
        even = _even_sizes(self._orders[1], self._grid)
        video_pairs = self._count_sorted(q_sizes) if even is None else self._count_ranks(q_sizes, *even)
        text_pairs = self._grid.num_tokens**2 - self._grid.video_len**2
        return (video_pairs + text_pairs) / self._grid.num_tokens**2

    def _count_sorted(self, q_sizes: Tensor) -> Tensor:
        """`[B, H, Mk]` float64 pairs of video tokens with 1 to `Mk` blocks a row, for blocks of any size."""
        k_sizes = _video_sizes(self._grid, self._orders[1].offsets)
        chosen = k_sizes[..., None, :].expand(self._scores.shape).gather(-1, self._best_first).cumsum(-1)
        return torch.einsum("bhq,bhqk->bhk", q_sizes, chosen)

    def _count_ranks(self, q_sizes: Tensor, size: int, others: dict[int, int]) -> Tensor:
        """The same where all blocks but `others` have `size` video tokens: what those lack, from their rank on."""
        b, h, _, m = self._scores.shape
        lacking = torch.zeros(b, h, m, dtype=torch.float64, device=self._scores.device)
        for block, own in others.items():
            score = self._scores[..., block, None]
            rank = (self._scores > score).sum(-1) + (self._scores[..., :block] == score).sum(-1)
            lacking.scatter_add_(-1, rank, q_sizes * (size - own))
        numbers = torch.arange(1, m + 1, dtype=torch.float64, device=self._scores.device)
        return q_sizes.sum(-1, keepdim=True) * size * numbers - lacking.cumsum(-1)


_known: weakref.WeakKeyDictionary[TokenOrder, dict[TokenGrid, tuple[int, dict[int, int]] | None]] = (
    weakref.WeakKeyDictionary()
)


def _even_sizes(order: TokenOrder, grid: TokenGrid) -> tuple[int, dict[int, int]] | None:
    """Video tokens of nearly all blocks, and of the few others by number; `None` where there is no such size.

    Read back from the device once an order; the answer lasts as long as the order.
    """
    known = _known.setdefault(order, {})
    if grid not in known:
        heads = _video_sizes(grid, order.offsets).flatten(0, 1).tolist()
        size = Counter(heads[0]).most_common(1)[0][0]
        others = {block: int(own) for block, own in enumerate(heads[0]) if own != size}
        is_even = len(others) <= _FEW_BLOCKS and all(head == heads[0] for head in heads)
        known[grid] = (int(size), others) if is_even else None
    return known[grid]


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


def text_blocks(grid: TokenGrid, offsets: Tensor) -> Tensor:
    """`[B|1, H|1, M]` bool: which of the blocks that `offsets` `[B|1, H|1, M+1]` bound hold text tokens."""
    start, end = offsets[..., :-1], offsets[..., 1:]
    return (start < grid.text_start + grid.text_len) & (end > grid.text_start) & (start < end)


def _video_sizes(grid: TokenGrid, offsets: Tensor) -> Tensor:
    """`[B|1, H|1, M]` float64 tokens a block, 0 for text blocks."""
    return offsets.diff(dim=-1).double().masked_fill(text_blocks(grid, offsets), 0.0)
