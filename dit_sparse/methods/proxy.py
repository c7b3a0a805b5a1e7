"""ProxyAttn: a few mean heads score the blocks for all heads, and every head has a budget of its own.

Source: Wang et al., "ProxyAttn: Guided Sparse Attention via Representative Heads", arXiv 2509.24745.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import (
    Ranking,
    block_sums,
    blocks_for_share,
    peak_logits,
    probe_rows,
    sampled_weights,
    share_out,
    text_blocks,
)
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, HeadShard, Previous, Scope, Site


@dataclass(frozen=True)
class ProxyAttention(AnyGrid):
    """Heads in `groups` groups; the mean queries and keys of a group score tokens for all its heads.

    A block is worth the largest logit in it, of every `row_stride`-th query of its row. How many blocks a head needs is
    estimated from `rows` of its own queries: those that reach `threshold` of their attention. `density` is shared out
    between the heads in proportion.

    Differs from the paper: not causal; the queries that set the budgets are spread over the video instead of the last
    block; the budgets are scaled to meet `density`, and are the estimate itself only with `density=None`; neighbouring
    heads make a group, and there is one by default; text is kept.

    Raises:
        ValueError: a share outside (0, 1], or a number below 1.
    """

    density: float | None = field(
        default=0.25,
        metadata={"help": "share of query-key pairs computed, text included, a mean over heads; none: by threshold"},
    )
    threshold: float = field(default=0.95, metadata={"help": "share of its attention that a head's budget must reach"})
    groups: int = field(default=1, metadata={"help": "groups of heads; each has one proxy head"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    row_stride: int = field(default=4, metadata={"help": "a proxy head reads every n-th query; 1 reads all"})
    rows: int = field(default=64, metadata={"help": "queries that set a head's budget"})

    name: ClassVar[str] = "proxy"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "ProxyAttn (arXiv 2509.24745), proxy heads and dynamic budgets"
    described: ClassVar[Description] = Description(
        order="raster",
        score="largest logit of the mean head of a group, every fourth query",
        selection="equally many a query block, budgets by head from 64 queries, text kept",
        differs="not causal; budgets scaled to the density; every fourth query",
    )
    control: ClassVar[str] = "threshold"
    overridden: ClassVar[dict[str, str]] = {}  # the threshold tells heads apart beside a density too
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        for name in ("threshold",) if self.density is None else ("threshold", "density"):
            check_share(name, getattr(self, name))
        check_block("block", self.block)
        for name in ("groups", "row_stride", "rows"):
            check_count(name, getattr(self, name))

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        heads = q.shape[1] if site.heads is None else site.heads.total
        count = min(self.groups, heads)
        groups = torch.arange(heads, device=q.device) * count // heads
        sizes = (groups[:, None] == torch.arange(count, device=q.device)).sum(0)
        groups = groups if site.heads is None else site.heads.own(groups[None])[0]
        proxy_q, proxy_k = (_group_means(x, groups, sizes, site.heads) for x in (q, k))
        scores = peak_logits(proxy_q, proxy_k, order, order, stride=self.row_stride).index_select(1, groups)
        mass = block_sums(sampled_weights(q, k, probe_rows(grid, self.rows, q.device)), order.offsets)
        is_text = text_blocks(grid, order.offsets)[0, 0]
        needed = blocks_for_share(mass.masked_fill(is_text, 0), self.threshold).double().mean(-1) / (~is_text).sum()
        video_pairs = grid.video_len**2 / grid.num_tokens**2
        density = (
            1 - (1 - needed) * video_pairs if self.density is None else _shared_out(needed, self.density, site.heads)
        )
        return AttentionPlan.from_kept(order, Ranking(scores, order, order, grid).select(density))


def _group_means(x: Tensor, groups: Tensor, sizes: Tensor, shard: HeadShard | None) -> Tensor:
    """`[B, G, N, D]` float32 means of the heads of each group; `groups` are those of `x`'s heads, `sizes` of all."""
    sums = torch.zeros(x.shape[0], len(sizes), *x.shape[2:], device=x.device).index_add_(1, groups, x.float())
    return (sums if shard is None else shard.sum(sums)) / sizes[:, None, None]


def _shared_out(needed: Tensor, density: float, shard: HeadShard | None) -> Tensor:
    """`density` shared out over all heads of the model, for those of `needed`."""
    return share_out(needed, density) if shard is None else shard.own(share_out(shard.gather(needed), density))
