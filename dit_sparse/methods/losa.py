"""LoSA: the fewest blocks that retain nearly all attention, measured exactly once and then frozen.

Source: Liu et al., "LoSA: Near-Lossless Sparse Attention for Training-Free Video Diffusion Acceleration",
arXiv 2608.12032.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels import dense_attention, sampled_block_mass
from dit_sparse.masks import keep_text, select_density, top_p, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_budget, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class LoSA(AnyGrid):
    """For each query block the fewest key blocks whose exact attention mass reaches `retained`, once a run.

    Masses are measured at the first sparse step, with the row sums of the dense step before it, and the blocks are kept
    to the end. Text is kept as queries and as keys, and takes no part in the share.

    The control is `retained`; the density that it comes to is in the statistics. With `density` every query block keeps
    equally many key blocks instead, so that it is met.

    Differs from the paper: which measures at an early dense step itself, while here the schedule's warm-up is dense;
    `row_stride` may spare queries (1 there).

    Raises:
        ValueError: a share outside (0, 1], or a block or row stride below 1.
    """

    retained: float = field(default=0.99, metadata={"help": "share of its attention that a query block keeps"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of retained; none: that decides"}
    )
    block: int = field(default=64, metadata={"help": "tokens a block"})
    row_stride: int = field(default=1, metadata={"help": "masses are of every n-th query of a block; 1 is of all"})

    name: ClassVar[str] = "losa"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "LoSA (arXiv 2608.12032)"
    described: ClassVar[Description] = Description(
        order="raster",
        score="exact attention mass, by the row LSE of a dense step",
        selection="top-p of a row, or equally many a row by density; text kept; frozen",
        cached="row LSE",
        differs="measured in the step after the last dense one",
    )
    control: ClassVar[str] = "retained"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = True
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_share("retained", self.retained)
        check_block("block", self.block)
        check_count("row_stride", self.row_stride)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the masses of `q, k` `[B, H, N, D]`, with `previous.lse` where there is one."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        lse = None if previous is None else previous.lse
        if lse is None:
            lse = dense_attention(q, k, v, return_lse=True)[1]
        mass = sampled_block_mass(q, k, lse, order, order, stride=self.row_stride, scale=q.shape[-1] ** -0.5)
        if self.density is not None:
            return AttentionPlan.from_kept(order, select_density(mass, self.density, order, order, grid))
        kept = top_p(without_text(mass, grid, order.offsets), self.retained)
        return AttentionPlan.from_kept(order, keep_text(kept, grid, order.offsets, order.offsets))
