"""DFSAttn: blocks scored by the attention among the means of small tiles of a Hilbert curve.

Source: Hu et al., "DFSAttn: Dynamic Fine-grained Sparse Attention for Efficient Video Generation", arXiv 2605.23445.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import select_density, sub_block_scores
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_share
from dit_sparse.reorder import curve_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class DfsAttention(AnyGrid):
    """The blocks that get most of the attention among tiles, equally many a query block.

    Tokens follow a Hilbert curve. Each tile of 16 tokens has a mean query and a mean key; a block is worth the sum of
    the softmax over its tiles, so that a few tokens that matter are not lost in the mean of the block. Plans are made
    anew at steps 12, 24 and 36 of 50. Text is kept as queries and as keys.

    Differs from the paper: its density falls from 0.3 to 0.2 and 0.1 with each of these plans, which is the schedule's
    `ramp=(0.3, 0.2, 0.1)`; the curve is a generalised Hilbert curve; short tiles count by their tokens.

    Raises:
        ValueError: a density outside (0, 1], or a block or tile below 1.
    """

    density: float = field(default=0.3, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=128, metadata={"help": "tokens a block"})
    tokens: int = field(default=16, metadata={"help": "tokens of the tiles that blocks are scored by"})

    name: ClassVar[str] = "dfsattn"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "DFSAttn (arXiv 2605.23445)"
    described: ClassVar[Description] = Description(
        order="space-filling curve",
        score="softmax of the products of the means of 16 tokens, summed over a block",
        selection="equally many a query block, text kept",
        differs="the density falls by the schedule's ramp",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.24, 0.48, 0.72)

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        check_block("tokens", self.tokens)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order along the curve."""
        return curve_once(grid, self.block, device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the tiles of `q, k` `[B, H, N, D]`, which stand along the curve where `site.in_order` is set."""
        order = self.shared_order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        scores = sub_block_scores(q, k, order, order, self.tokens)
        return AttentionPlan.from_kept(order, select_density(scores, self.density, order, order, site.grid))
