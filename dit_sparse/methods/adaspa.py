"""AdaSpa: blocks found by an exact online search at a few steps, and reused in between.

Source: Xia et al., "Training-free and Adaptive Sparse Attention for Efficient Long Video Generation", arXiv 2502.21079.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import dense_attention, sampled_block_mass
from dit_sparse.masks import Ranking
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_count, check_share
from dit_sparse.methods.raster_or_tiles import RasterOrTiles
from dit_sparse.types import AttentionPlan, HeadShard, Previous, Scope, Site


@dataclass(frozen=True)
class AdaSpa(RasterOrTiles):
    """The key blocks of the largest attention mass, equally many a query block, found online (sections 4.2, 4.3).

    The first search needs the row LSE of a dense attention; the schedule keeps the one of the last dense step. The
    search then sums exp(q k^T / sqrt(d) - LSE) over every block. Later searches reuse that LSE, which barely moves.
    Text blocks are kept as queries and as keys.

    Differs from the paper: the density is 0.25 by default, 0.2 there; the search reads every `row_stride`-th query of a
    block instead of all (1 there); searches come at shares of the run (after the dense warm-up of 20% and at 60%: the
    paper's steps 10 and 30 of 50); and the first search takes the LSE of the dense step before it, where the paper's
    makes a dense pass at its own step. `cache_lse=False` makes one at every search, the paper's ablation. Blocks are
    runs of the raster order there; with a `tile` they are 3-D tiles, whose means stand in better for their tokens.

    Raises:
        ValueError: a density, recall or head shift outside (0, 1], a side of the tile, a block or a row stride below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block, where no tile is given"})
    tile: tuple[int, int, int] | None = field(
        default=None, metadata={"help": "order the video by tiles of this size, one tile a block; none: raster"}
    )
    head_adaptive: bool = field(default=True, metadata={"help": "move density from concentrated heads to diffuse ones"})
    recall: float = field(
        default=0.8, metadata={"help": "a head that keeps more of its mass than this can give blocks"}
    )
    head_shift: float = field(default=0.5, metadata={"help": "share of its density that such a head gives away"})
    row_stride: int = field(default=4, metadata={"help": "the search reads every n-th query of a block; 1 reads all"})
    cache_lse: bool = field(
        default=True, metadata={"help": "searches reuse the row LSE of the last dense step; false makes it anew"}
    )

    name: ClassVar[str] = "adaspa"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "AdaSpa (arXiv 2502.21079), algorithm 1"
    described: ClassVar[Description] = Description(
        order="raster, or 3-D tiles",
        score="exact attention mass, by the row LSE of a dense step, on every fourth query",
        selection="equally many a query block, budgets by head, text kept",
        cached="row LSE",
        differs="density .25 instead of .2, every fourth query instead of all, searches at shares of the run",
    )
    scope: ClassVar[Scope] = "call"
    even_tiles: ClassVar[bool] = True
    refresh: ClassVar[tuple[float, ...]] = (0.6,)

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_share("recall", self.recall)
        check_share("head_shift", self.head_shift)
        self.check_blocks()
        check_count("row_stride", self.row_stride)

    @property
    def uses_lse(self) -> bool:
        """Whether a dense step should hand its LSE over."""
        return self.cache_lse

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from one search over `q, k, v` `[B, H, N, D]`, with `previous.lse` where there is one."""
        order = self.order(site.grid, q.device)
        lse = None if previous is None or not self.cache_lse else previous.lse
        if not site.in_order:
            q, k, v = (order.permute(x) for x in (q, k, v))
            lse = None if lse is None else order.permute(lse)
        if lse is None:
            lse = dense_attention(q, k, v, return_lse=True)[1]
        mass = sampled_block_mass(q, k, lse, order, order, stride=self.row_stride, scale=q.shape[-1] ** -0.5)
        ranking = Ranking(mass, order, order, site.grid)
        kept = ranking.select(self.density)
        if self.head_adaptive and self.density < 1:
            densities = head_densities(mass, kept, self.density, self.recall, self.head_shift, site.heads)
            kept = ranking.select(densities)
        return AttentionPlan.from_kept(order, kept)


def head_densities(
    mass: Tensor, kept: Tensor, density: float, recall: float, shift: float = 0.5, shard: HeadShard | None = None
) -> Tensor:
    """Densities `[B, H]` float64 that move blocks from the heads of highest recall to those of lowest (section 4.3).

    With `n` heads above `recall`, at most half of all, the `n` best get sparsity (1 + s) / 2 and the `n` worst
    (3 s - 1) / 2, clamped at 0, where s = 1 - `density`: half of the density is moved, or `shift` of it.

    Args:
        mass, kept: `[B, H, Mq, Mk]` block masses and the blocks kept at equal density.
        shard: which heads they are of, where others are on other ranks.
    """
    head_recall = (mass * kept).sum((-1, -2)) / mass.sum((-1, -2)).clamp_min(torch.finfo(mass.dtype).tiny)
    head_recall = head_recall if shard is None else shard.gather(head_recall)
    heads = head_recall.shape[1]
    moved = (head_recall > recall).sum(1, keepdim=True).clamp_max(heads // 2)
    rank = head_recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    result = torch.full(head_recall.shape, density, dtype=torch.float64, device=mass.device)
    # A head that gives all its density away still keeps one block a row.
    result = result.masked_fill(rank < moved, density * (1 - shift))
    result = result.masked_fill(rank >= heads - moved, min(1.0, density * (1 + shift)))
    return result if shard is None else shard.own(result)
