"""Sparse VideoGen: each head is a spatial or a temporal one, found out at every step from a few queries.

Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity",
arXiv 2502.01776.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.masks import heaviest_blocks, mask_rows, masked_errors, probe_rows, spread_ties
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_count, check_share
from dit_sparse.reorder import axis_order, choose_order, raster_order
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class SparseVideoGen(AnyGrid):
    """One band mask under two orders: frame by frame for spatial heads, place by place for temporal ones.

    A band around the diagonal of the raster order holds the frames around a query's own; the same band with the video
    transposed, frames innermost, holds the same place in all frames. For `rows` queries the output under both masks is
    compared with dense attention, and each head takes the order of the smaller mean squared error (algorithm 1). The
    first frame, or the same share of the transposed video, is kept as a sink, and text as queries and keys.

    Differs from the paper: the band is as wide as `density` allows, with every n-th block of its border so that it is
    met; the sink is whole blocks and takes at most half of the density; the queries are the same at every step, one of
    each of `rows` equal stretches of the video; text rows and columns count in the density.

    Raises:
        ValueError: a density outside (0, 1], or a block or a number of rows below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    rows: int = field(default=64, metadata={"help": "queries whose error decides whether a head is temporal"})
    sink: bool = field(default=True, metadata={"help": "keep the first frame as keys of every query"})

    name: ClassVar[str] = "svg"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sparse VideoGen (arXiv 2502.01776), algorithm 1"
    described: ClassVar[Description] = Description(
        order="per head raster or transposed, frames innermost",
        score="nearness to the diagonal",
        selection="a band and the first frame, text kept; the order of the smaller error on 64 queries",
        cached="orders, mask",
        differs="the sink takes at most half of the density; the same 64 queries at every step",
    )
    scope: ClassVar[Scope] = "call"
    head_orders: ClassVar[int] = 1
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        check_count("rows", self.rows)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan in which every head of `q, k, v` `[B, H, N, D]` has the better of the two orders."""
        fixed = _fixed(self, site.grid, q.device)
        temporal = masked_errors(q, k, v, fixed.rows, fixed.masks).argmin(0)
        order = choose_order(fixed.orders, temporal)
        return AttentionPlan(order, order, fixed.block_mask)


class _Fixed(NamedTuple):
    """What depends on the grid alone: the two orders, their common mask, and its rows for the probed queries."""

    orders: tuple[TokenOrder, TokenOrder]
    block_mask: BlockMask
    rows: Tensor
    masks: Tensor


@lru_cache(maxsize=16)
def _fixed(method: SparseVideoGen, grid: TokenGrid, device: torch.device) -> _Fixed:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        orders = (
            raster_order(grid, method.block, device=device),
            axis_order(grid, "HWF", method.block, device=device),
        )
        offsets = orders[0].offsets
        number = torch.arange(offsets.shape[-1] - 1, device=device)
        nearness = len(number) - (number[:, None] - number).abs()
        first = -(-grid.text_len // method.block) if grid.text_first else 0
        sink = (number >= first) & (number < first + sink_blocks(method, grid)) & method.sink
        # The diagonal comes before the sink, so that every query sees itself whatever the density.
        score = spread_ties(nearness.masked_fill(sink, len(number) + 1).fill_diagonal_(len(number) + 2))
        kept = heaviest_blocks(score[None, None], method.density, offsets, grid)
        rows = probe_rows(grid, method.rows, device)
        masks = torch.stack([mask_rows(kept[0, 0], order, rows) for order in orders])
        return _Fixed(orders, BlockMask.from_bool(kept, offsets, offsets), rows, masks)


def sink_blocks(method: SparseVideoGen, grid: TokenGrid) -> int:
    """Blocks of the sink: those of one frame, as long as they are no more than half of what text leaves."""
    one_frame = max(1, round(grid.height * grid.width / method.block))
    text_pairs = grid.num_tokens**2 - grid.video_len**2
    left = method.density * grid.num_tokens**2 - text_pairs
    return max(0, min(one_frame, int(left / 2 / grid.video_len / method.block)))
