"""Sol-Attn: the blocks whose score stands out from the others of their row, and the means of all others.

Source: Sol-Attn, arXiv 2607.24027.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.block_mask import pack_words
from dit_sparse.kernels import Route, deviations, routed_plan
from dit_sparse.masks import heaviest_blocks, keep_text, text_blocks
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget
from dit_sparse.reorder import morton_once
from dit_sparse.types import AttentionPlan, Previous, Remainder, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class SolAttention(AnyGrid):
    """Key blocks that score `tau` standard deviations above the mean of their row; the remainder is "mean".

    The score of a pair of blocks is the product of their means; its mean and variance over the key blocks of the video
    are those that the first and second moments of the mean keys give. Blocks next to a query block in the order, its
    own, and text as queries and as keys are kept too. Tokens follow a Morton curve.

    The control is `tau`; the density that it comes to is in the statistics. With `density` each head keeps the blocks
    that stand out most, whatever their row, so that it is met.

    With `in_kernel` a Triton kernel finds the blocks as it attends, as the paper's does: one tile of scores says which
    are kept and is what the means of the others attend by, and no map of blocks x blocks scores is written. It keeps
    the same blocks, but for rounding. It needs a GPU from compute capability 8.0 on, blocks of at most one tile, and
    the remainder "mean" or "none".

    Differs from the paper: without `in_kernel`, the default because it is faster where the "hopper" backend runs,
    scores are made first and written down; the variance is exact, instead of by the diagonal of the second moments; a
    block whose keys lie too far apart for a mean leaves nothing; the paper's dense steps (10 of 50) and dense first
    layer are the schedule's.

    Raises:
        ValueError: a `tau` that is no number, a density outside (0, 1] or beside `in_kernel`, or a block below 1.
    """

    tau: float = field(default=1.0, metadata={"help": "standard deviations above the mean score of a row"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of tau; none: tau decides"}
    )
    block: int = field(default=64, metadata={"help": "tokens a block"})
    in_kernel: bool = field(
        default=False, metadata={"help": "find the blocks in the kernel (Triton), without maps; false: plan them first"}
    )

    name: ClassVar[str] = "solattn"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sol-Attn (arXiv 2607.24027)"
    described: ClassVar[Description] = Description(
        order="Morton curve",
        score="product of block means, in standard deviations of its row",
        selection="above a threshold, or the largest of a head by density; neighbours and text kept; the rest as means",
        differs="scores are made first unless in_kernel says otherwise; exact variance",
    )
    control: ClassVar[str] = "tau"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP
    own_remainder: ClassVar[Remainder] = "mean"

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_block("block", self.block)
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not math.isfinite(self.tau):
            raise ValueError(f"tau must be a number, got {self.tau!r}: 1 is the paper's")
        if self.in_kernel and self.density is not None:
            raise ValueError(
                f"density must be none with in_kernel, got {self.density:g}: the kernel knows one row at a time; use "
                "tau, or in_kernel=False"
            )

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order along the curve."""
        return morton_once(grid, self.block, device)

    def route(self, grid: TokenGrid, device: torch.device) -> Route | None:
        """What the kernel goes by that finds the blocks itself; `None` where they are planned first."""
        return _route(self.shared_order(grid, device), grid, self.tau) if self.in_kernel else None

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the block means of `q, k` `[B, H, N, D]`, which stand along the curve where `site.in_order`."""
        grid, order = site.grid, self.shared_order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        route = _route(order, grid, self.tau)
        if self.density is None:
            return routed_plan(q, k, route, self.own_remainder)
        # Exponentials rank as the deviations do, and none is negative.
        weights = deviations(q, k, route).clamp(max=80.0).exp().masked_fill(route.forced, math.inf)
        kept = heaviest_blocks(weights, self.density, order.offsets, grid)
        return AttentionPlan.from_kept(order, kept, remainder=self.own_remainder)


# By order and grid, not the routes themselves: they hold the order, which would never go.
_known: weakref.WeakKeyDictionary[TokenOrder, dict[TokenGrid, tuple[Tensor, Tensor, Tensor]]] = (
    weakref.WeakKeyDictionary()
)


def _route(order: TokenOrder, grid: TokenGrid, tau: float) -> Route:
    """A block's neighbours, itself and text are kept whatever they score; text does not count. Found once."""
    known = _known.setdefault(order, {})
    if grid not in known:
        with torch.inference_mode(False):
            number = torch.arange(order.num_blocks, device=order.index.device)
            near = (number[:, None] - number).abs() <= 1
            forced = keep_text(near[None, None], grid, order.offsets, order.offsets)
            known[grid] = forced, pack_words(forced), ~text_blocks(grid, order.offsets)
    return Route(order, *known[grid], tau)
