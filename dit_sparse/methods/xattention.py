"""XAttention: blocks by the sums of strided antidiagonals of their scores.

Source: Xu et al., "XAttention: Block Sparse Attention with Antidiagonal Scoring", arXiv 2503.16428.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels import antidiagonal_scores
from dit_sparse.masks import keep_text, select_density, top_p, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class XAttention(AnyGrid):
    """The fewest blocks of a row whose antidiagonal scores reach a share of the row's sum (algorithm 1).

    Every `stride`-th antidiagonal of a block's scores is summed, which costs a `stride`-th of all products; a softmax
    over the sums gives shares, and each query block keeps the smallest set of key blocks that reaches `top_p` of its
    video's. Text blocks are kept as queries and as keys.

    The control is `top_p`; the density that it comes to is in the statistics. With `density` every query block keeps
    equally many key blocks instead, so that it is met.

    Differs from the paper: bidirectional instead of causal; groups of the stride start anew in every block, so that
    blocks of any size do; one threshold for all heads, where the paper searches one for each.

    Raises:
        ValueError: a share outside (0, 1], or a block or a stride below 1.
    """

    top_p: float = field(default=0.9, metadata={"help": "share of its attention that a query block keeps"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of top_p; none: top_p decides"}
    )
    block: int = field(default=128, metadata={"help": "tokens a block"})
    stride: int = field(default=8, metadata={"help": "every n-th antidiagonal is summed"})

    name: ClassVar[str] = "xattention"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "XAttention (arXiv 2503.16428), algorithm 1"
    described: ClassVar[Description] = Description(
        order="raster",
        score="sums of every 8th antidiagonal, softmax over them",
        selection="top-p of a row, or equally many a row by density; text kept",
        differs="bidirectional; groups start anew in each block; one threshold for all heads",
    )
    control: ClassVar[str] = "top_p"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_share("top_p", self.top_p)
        check_block("block", self.block)
        check_count("stride", self.stride)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the antidiagonals of `q, k` `[B, H, N, D]`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        offsets, sizes = order.offsets, order.geometry
        scores = antidiagonal_scores(q, k, offsets, offsets, stride=self.stride, q_blocks=sizes, k_blocks=sizes)
        if self.density is not None:
            return AttentionPlan.from_kept(order, select_density(scores, self.density, order, order, grid))
        kept = top_p(without_text(scores, grid, offsets), self.top_p)
        return AttentionPlan.from_kept(order, keep_text(kept, grid, offsets, offsets))
