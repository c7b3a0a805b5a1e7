"""Sparse VideoGen 2: clusters of like queries and of like keys, and the pairs of clusters of most attention.

Source: Yang et al., "Sparse VideoGen2: Accelerate Video Generation with Sparse Attention via Semantic-Aware
Permutation", arXiv 2505.18875.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import keep_text, pooled_scores, select_density, top_p, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget, check_count, check_share
from dit_sparse.reorder import cluster_order, kmeans, spread_tokens
from dit_sparse.types import AttentionPlan, PackedPlan, Previous, Remainder, Scope, Site, TokenGrid, TokenOrder

_TEXT_BLOCK = 64


@dataclass(frozen=True)
class SparseVideoGen2(AnyGrid):
    """K-means on queries and on keys apart; of their clusters' products the smallest set that reaches `top_p`.

    A pair of clusters scores softmax(q_i . k_j / sqrt(d)) of their means, weighted by the number of keys. Each query
    cluster keeps key clusters up to a share of `top_p` of its video, at least `min_kept` of all, and
    all text. Clusters are uneven blocks, of every batch and head its own. The first plan of a run makes
    `first_iterations`; later ones start from the clusters of the last plan and make `iterations`.

    The control is `top_p`; the density that it comes to is in the statistics. With `density` every query cluster keeps
    equally many key clusters instead, so that it is met.

    Differs from the paper: there are as many clusters as make a mean size, since grids differ (the paper's 300 and 1000
    at 75,600 tokens); k-means starts from tokens at equal distances instead of random ones, makes fewer iterations at
    first (50 there), and later starts from the means of the tokens now in the last plan's clusters, not from stored
    centroids. Sizes of clusters are read back from a GPU once a plan.

    Raises:
        ValueError: a share outside (0, 1], or a size or a number of iterations below 1.
    """

    top_p: float = field(default=0.9, metadata={"help": "share of its attention that a query cluster keeps"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of top_p; none: top_p decides"}
    )
    min_kept: float = field(default=0.1, metadata={"help": "least share of the key clusters kept, under top_p"})
    q_tokens: int = field(default=256, metadata={"help": "mean tokens of a query cluster"})
    k_tokens: int = field(default=76, metadata={"help": "mean tokens of a key cluster"})
    first_iterations: int = field(default=5, metadata={"help": "iterations of k-means at the first plan of a run"})
    iterations: int = field(default=2, metadata={"help": "iterations at every later plan"})

    name: ClassVar[str] = "svg2"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sparse VideoGen2 (arXiv 2505.18875)"
    described: ClassVar[Description] = Description(
        order="k-means clusters of queries and of keys, uneven, per head",
        score="softmax of the products of cluster means, weighted by size",
        selection="top-p of a row, or equally many a row by density; text kept",
        cached="the clusters of the last plan",
        differs="clusters of a mean size, 5 first iterations instead of 50, started from tokens at equal distances",
    )
    control: ClassVar[str] = "top_p"
    scope: ClassVar[Scope] = "call"
    head_orders: ClassVar[int] = 2
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP
    own_remainder: ClassVar[Remainder] = "none"

    def __post_init__(self) -> None:
        check_budget(self.density)
        for name in ("top_p", "min_kept"):
            check_share(name, getattr(self, name))
        for name in ("q_tokens", "k_tokens"):
            check_block(name, getattr(self, name))
        for name in ("first_iterations", "iterations"):
            check_count(name, getattr(self, name))

    @torch.no_grad()
    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from clusters of `q, k` `[B, H, N, D]`, which start from those of `previous.plan`."""
        q_order, kv_order = self._orders(q, k, site, previous)
        kept = self._kept(q_order.permute(q), kv_order.permute(k), kv_order.permute(v), q_order, kv_order, site)
        mask = BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets)
        return AttentionPlan(q_order, kv_order, mask, self.own_remainder)

    def _orders(self, q: Tensor, k: Tensor, site: Site, previous: Previous | None) -> tuple[TokenOrder, TokenOrder]:
        """The orders of queries and of keys."""
        grid, plan = site.grid, None if previous is None else previous.plan
        (q_start, q_count), (k_start, k_count) = self._starts(q, k, grid, plan)
        iterations = self.first_iterations if plan is None else self.iterations
        labels = kmeans(video_of(q, grid), q_start, iterations), kmeans(video_of(k, grid), k_start, iterations)
        return orders_of(labels[0], q_count, labels[1], k_count, grid)

    def _starts(
        self, q: Tensor, k: Tensor, grid: TokenGrid, last: AttentionPlan | PackedPlan | None
    ) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        """Centroids to start from and their number, of queries and of keys; those of the `last` plan's clusters."""
        return (
            _start(q, grid, self.q_tokens, None if last is None else last.q_order),
            _start(k, grid, self.k_tokens, None if last is None else last.kv_order),
        )

    def _kept(self, q: Tensor, k: Tensor, v: Tensor, q_order: TokenOrder, kv_order: TokenOrder, site: Site) -> Tensor:
        """`[B, H, Mq, Mk]` bool, of tokens in the orders' positions."""
        scores = pooled_scores(q, k, q_order, kv_order)
        if self.density is not None:
            return select_density(scores, self.density, q_order, kv_order, site.grid)
        kept = top_p(without_text(scores, site.grid, kv_order.offsets), self.top_p, self._least(site))
        return keep_text(kept, site.grid, q_order.offsets, kv_order.offsets)

    def _least(self, site: Site) -> int:
        """Key clusters that every query cluster keeps."""
        return max(1, int(self.min_kept * cluster_count(site.grid, self.k_tokens)))


def video_of(x: Tensor, grid: TokenGrid) -> Tensor:
    """The video's tokens of `x` `[B, H, N, D]`."""
    return x[:, :, grid.video_start : grid.video_start + grid.video_len]


def orders_of(
    q_labels: Tensor, q_count: int, k_labels: Tensor, k_count: int, grid: TokenGrid
) -> tuple[TokenOrder, TokenOrder]:
    """Orders of queries and of keys by their clusters."""
    q_order, kv_order = (
        cluster_order(labels, count, grid, _TEXT_BLOCK) for labels, count in ((q_labels, q_count), (k_labels, k_count))
    )
    return q_order, kv_order


def _start(x: Tensor, grid: TokenGrid, tokens: int, last: TokenOrder | None) -> tuple[Tensor, int]:
    """Centroids `[B, H, C, D]` float32 of clusters of a mean size of `tokens`, and C."""
    count = cluster_count(grid, tokens)
    start = spread_tokens(video_of(x, grid), count).float()
    if last is None:
        return start, count
    first = -(-grid.text_len // _TEXT_BLOCK) if grid.text_first else 0
    inside = slice(first, first + count)
    means = pooled_blocks(last.permute(x), last.offsets)[:, :, inside]
    return torch.where(last.block_sizes[..., inside, None] > 0, means.float(), start), count


def cluster_count(grid: TokenGrid, tokens: int) -> int:
    """How many clusters have a mean size of `tokens`."""
    return max(1, round(grid.video_len / tokens))
