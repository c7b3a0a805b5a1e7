"""AnchorAttention: keys that come near to a query's largest logit, found one by one and gathered into blocks.

Source: Zhang et al., "AnchorAttention: Difference-Aware Sparse Attention with Stripe Granularity", arXiv 2505.23520.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import Ranking, block_maxima, keep_text, text_blocks
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once, sort_in_segments
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class AnchorAttention(AnyGrid):
    """Stripes of keys whose logit is within `theta` of an anchor.

    The anchor of a block of queries is the largest logit of its mean query in blocks that are always kept: the first
    `sink` ones and its own segment. A key is wanted if its logit is at least the anchor less `theta`. Within segments,
    keys are sorted by how many blocks of queries want them, so that stripes of single keys become blocks.

    With a `density` every row keeps its best blocks, by the largest difference to the anchor in them. With
    `density=None` it keeps every block that holds a wanted key, as the paper does key by key.

    Differs from the paper: not causal; one set of stripes a block of queries instead of one for 16 of them, gathered in
    an order of keys that all of a head's queries share, so that unwanted keys fill up the last block of a stripe; the
    local blocks are the query's segment; text is kept.

    Raises:
        ValueError: a density outside (0, 1], a negative theta, a number below 1, or a segment that is no multiple of
            the block.
    """

    density: float | None = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included; none: by theta"}
    )
    theta: float = field(default=12.0, metadata={"help": "a key this much below the anchor, or less, is wanted"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    segment: int = field(default=256, metadata={"help": "tokens within which keys are sorted; a query's own is kept"})
    sink: int = field(default=1, metadata={"help": "blocks at the start that every query keeps"})

    name: ClassVar[str] = "anchor"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "AnchorAttention (arXiv 2505.23520), anchors and stripes"
    described: ClassVar[Description] = Description(
        order="queries raster, keys sorted in segments by how many query blocks want them",
        score="largest mean q . k of a block, less that in the sink and the own segment",
        selection="sink and own segment, then equally many a query block, or all within theta; text kept",
        cached="key orders",
        differs="not causal; stripes are gathered once a head, not once for 16 query blocks",
    )
    control: ClassVar[str] = "theta"
    overridden: ClassVar[dict[str, str]] = {}  # theta orders the keys beside a density too
    scope: ClassVar[Scope] = "call"
    head_orders: ClassVar[int] = 1
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        if self.density is not None:
            check_share("density", self.density)
        check_block("block", self.block)
        check_count("sink", self.sink)
        if not self.theta >= 0:
            raise ValueError(f"theta must be 0 or more, got {self.theta!r}: 12 is the paper's")
        if self.segment < 1 or self.segment % self.block:
            raise ValueError(f"segment must be a multiple of block {self.block}, got {self.segment!r}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`, with an order of keys for every batch and head."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        always = always_kept(order, grid, self.sink, self.segment // self.block)
        means = pooled_blocks(q, order.offsets).float() * q.shape[-1] ** -0.5
        votes = torch.empty(q.shape[:3], device=q.device)
        peaks = torch.empty(*means.shape[:3], order.num_blocks, device=q.device)
        # Head by head: the map of query blocks and keys is the largest thing here.
        for b in range(q.shape[0]):
            for h in range(q.shape[1]):
                logits = means[b, h] @ k[b, h].float().t()
                anchors = block_maxima(logits, order).masked_fill(~always, float("-inf")).amax(-1, keepdim=True)
                votes[b, h] = (logits >= anchors - self.theta).sum(0)
                keys = sort_in_segments(order, grid, votes[None, None, b, h], self.segment)
                peaks[b, h] = block_maxima(logits.index_select(-1, keys.index[0, 0]), order) - anchors
        kv_order = sort_in_segments(order, grid, votes, self.segment)
        if self.density is None:
            kept = keep_text(always | (peaks >= -self.theta), grid, order.offsets, order.offsets)
        else:
            ranking = Ranking(peaks.masked_fill(always, float("inf")), order, order, grid)
            kept = ranking.select(self.density)
        return AttentionPlan(order, kv_order, BlockMask.from_bool(kept, order.offsets, order.offsets))


def always_kept(order: TokenOrder, grid: TokenGrid, sink: int, segment: int) -> Tensor:
    """`[M, M]` bool: the first `sink` video blocks as keys, and the blocks of the query's own segment of `segment`.

    Text keeps to itself here; every row has a block.
    """
    is_text = text_blocks(grid, order.offsets)[0, 0]
    number = (~is_text).cumsum(0) - 1
    own = (number[:, None] // segment == number // segment) & (is_text[:, None] == is_text)
    return own | (~is_text & (number < sink))
