"""PISA: the best blocks exactly, all others by a first-order expansion around their means.

Source: Li et al., "PISA: Piecewise Sparse Attention Is Wiser for Efficient Diffusion Transformers", arXiv 2602.01077.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import pooled_scores, product_spread, select_density
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Remainder, Scope, Site


@dataclass(frozen=True)
class Pisa(AnyGrid):
    """Equally many blocks a row by the products of block means (equation 11); the remainder is "value" (3.2, 3.3).

    For images a block counts for more, by the factor |H_j - H|, where its first order is far from that of all: H_j is
    the sum over the block of (k - mean(k))^T v, H the mean of all H_j. Text is kept as queries and as keys.

    Differs from the paper: the expansion has one matrix H a query block, weighted by what it attends to, instead of one
    a head; a block whose keys lie too far apart for a mean leaves nothing; text; a warm-up in steps of the schedule,
    whose paper's is 10 or 15 of 50 steps and the first layer.

    Raises:
        ValueError: a density outside (0, 1], or a block below 1.
    """

    density: float = field(default=0.15, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    covariance: bool | None = field(
        default=None, metadata={"help": "weigh blocks by how unlike their first order is; none: images alone"}
    )

    name: ClassVar[str] = "pisa"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "PISA (arXiv 2602.01077), equation 11 and algorithm 1"
    described: ClassVar[Description] = Description(
        order="raster",
        score="softmax of the products of block means; in images weighed by how unlike a block's first order is",
        selection="equally many a query block, text kept; the rest by value",
        differs="the first order has a matrix a query block instead of a head; keys too far apart leave nothing",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP
    own_remainder: ClassVar[Remainder] = "value"

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the block means of `q, k` `[B, H, N, D]`, and for images from `v`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        scores = pooled_scores(q, k, order, order)
        if grid.frames == 1 if self.covariance is None else self.covariance:
            # A factor, which orders the blocks as the logarithm under the softmax does.
            scores = scores * product_spread(k, v, order)[..., None, :].clamp_min(torch.finfo(torch.float32).tiny)
        kept = select_density(scores, self.density, order, order, grid)
        return AttentionPlan.from_kept(order, kept, remainder=self.own_remainder)
