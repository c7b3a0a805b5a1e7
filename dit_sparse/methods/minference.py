"""MInference: every head has one of three sparse patterns.

Source: Jiang et al., "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention",
arXiv 2407.02490.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import (
    Ranking,
    block_sums,
    pooled_scores,
    probe_rows,
    sampled_weights,
    sink_and_nearness,
    text_blocks,
)
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder

PATTERNS = ("a-shape", "vertical-slash", "block-sparse")


@dataclass(frozen=True)
class MInference(AnyGrid):
    """A-shape, vertical-slash or block-sparse, for each head the one that keeps most of the attention (section 3).

    - a-shape: the first `sink` blocks of keys and those nearest to the query.
    - vertical-slash: lines of the attention map, keys that every query wants and keys at a fixed distance. The
      attention of `rows` queries gives each line its mean mass (algorithm 2); a block is worth that of the better of
      the two lines through it.
    - block-sparse: the softmax of mean query times mean key (algorithm 3).

    Every row of blocks keeps its best ones, equally many in every pattern. A head's pattern is the one under which
    those `rows` queries keep most of their attention.

    Differs from the paper: attention is bidirectional, so a slash may lie ahead, and the queries are spread over the
    video instead of the last 64; lines are as wide as a block, and compete by mass instead of having fixed numbers; the
    pattern of a head is chosen at every plan, by mass kept, instead of once on a sample, by the output; text is kept.

    Raises:
        ValueError: a density outside (0, 1], an unknown pattern, or a block, sink or number of rows below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    pattern: str = field(
        default="auto", metadata={"help": "a-shape, vertical-slash, block-sparse, or auto: the best for each head"}
    )
    block: int = field(default=64, metadata={"help": "tokens a block"})
    sink: int = field(default=1, metadata={"help": "blocks at the start that an a-shape keeps as keys"})
    rows: int = field(default=64, metadata={"help": "queries whose attention is looked at"})

    name: ClassVar[str] = "minference"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "MInference (arXiv 2407.02490), algorithms 2 and 3"
    described: ClassVar[Description] = Description(
        order="raster",
        score="per head: sink and nearness, vertical and slash lines of 64 queries, or mean q . mean k",
        selection="equally many a query block, text kept; the pattern that keeps most of the 64 queries' mass",
        differs="bidirectional; lines a block wide; patterns chosen online, by mass",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        check_count("sink", self.sink)
        check_count("rows", self.rows)
        if self.pattern not in ("auto", *PATTERNS):
            raise ValueError(f"pattern must be auto or one of {', '.join(PATTERNS)}, got {self.pattern!r}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        rows = probe_rows(grid, self.rows, q.device)
        mass = block_sums(sampled_weights(q, k, rows), order.offsets)
        row_blocks = torch.searchsorted(order.offsets[0, 0, 1:].contiguous(), rows.int(), right=True)
        kept = []
        for pattern in PATTERNS if self.pattern == "auto" else (self.pattern,):
            if pattern == "a-shape":
                scores = sink_and_nearness(order, grid, self.sink).expand(*q.shape[:2], -1, -1)
            elif pattern == "vertical-slash":
                scores = line_scores(mass, row_blocks, order, grid)
            else:
                scores = pooled_scores(q, k, order, order)
            kept.append(Ranking(scores, order, order, grid).select(self.density))
        recalls = torch.stack([(mass * of_pattern[:, :, row_blocks]).sum((-1, -2)) for of_pattern in kept])
        best = recalls.argmax(0)[None, ..., None, None].expand(1, *kept[0].shape)
        return AttentionPlan.from_kept(order, torch.stack(kept).gather(0, best)[0])


def line_scores(mass: Tensor, row_blocks: Tensor, order: TokenOrder, grid: TokenGrid) -> Tensor:
    """Mean mass of the better of the two lines through each block, the vertical and the slash, `[B, H, M, M]`.

    Args:
        mass: `[B, H, R, M]` attention of some queries in each key block.
        row_blocks: `[R]` int64 blocks of those queries.
        order: the raster order.
        grid: the layout of the sequence.
    """
    blocks = mass.shape[-1]
    number = torch.arange(blocks, device=mass.device)
    is_video = (~text_blocks(grid, order.offsets)[0, 0]).float()
    # Slash s holds the pairs whose key block is s - (M - 1) blocks after the query's.
    slash = number - row_blocks[:, None] + blocks - 1
    sums = mass.new_zeros(*mass.shape[:2], 2 * blocks - 1)
    sums.scatter_add_(-1, slash.flatten().expand(*mass.shape[:2], -1), (mass * is_video).flatten(2))
    counts = mass.new_zeros(2 * blocks - 1).scatter_add_(-1, slash.flatten(), is_video.repeat(len(row_blocks)))
    means = sums / counts.clamp(min=1)
    through = means[..., number - number[:, None] + blocks - 1]
    return through.maximum(mass.mean(2)[..., None, :])
