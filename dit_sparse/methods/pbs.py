"""PBS-Attn: keys that many queries want are brought together, and fewer blocks then hold them.

Source: Wang et al., "Sparser Block-Sparse Attention via Token Permutation", arXiv 2510.21270.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import antidiagonal_scores
from dit_sparse.masks import keep_text, pooled_scores, probe_rows, sampled_weights, select_density, top_p
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once, sort_in_segments
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class PbsAttention(AnyGrid):
    """Within segments, keys are sorted by the mean attention of `rows` queries; then blocks are selected.

    Queries stay where they are. Blocks are scored by mean query times mean key, or by antidiagonals as in XAttention.
    Attention does not change under a permutation of keys and values, so nothing but the choice of blocks depends on it.

    Differs from the paper: the queries are spread over the video instead of the last block; not causal, so a segment
    is no more than a bound on how far a key moves; equally many blocks a row by `density`, where the paper takes the
    smallest set that reaches `threshold` (`density=None`); text keeps its place and is kept.

    Raises:
        ValueError: a share outside (0, 1], a number below 1, or a segment that is no multiple of the block.
    """

    density: float | None = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included; none: by threshold"}
    )
    threshold: float = field(default=0.9, metadata={"help": "estimated mass that a row keeps where density is none"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    segment: int = field(default=256, metadata={"help": "tokens within which keys are sorted"})
    rows: int = field(default=64, metadata={"help": "queries whose mean attention sorts the keys"})
    antidiagonal: bool = field(default=False, metadata={"help": "score blocks by antidiagonals instead of means"})

    name: ClassVar[str] = "pbs"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "PBS-Attn (arXiv 2510.21270), segmented permutation"
    described: ClassVar[Description] = Description(
        order="queries raster, keys sorted in segments by the mean attention of 64 queries",
        score="mean q . mean k, or antidiagonals",
        selection="equally many a query block, or the smallest set of .9 of the estimated mass; text kept",
        cached="key orders",
        differs="not causal; queries spread over the video; a density instead of the threshold",
    )
    control: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = "call"
    head_orders: ClassVar[int] = 1
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        for name in ("threshold",) if self.density is None else ("threshold", "density"):
            check_share(name, getattr(self, name))
        check_block("block", self.block)
        check_count("rows", self.rows)
        if self.segment < 1 or self.segment % self.block:
            raise ValueError(f"segment must be a multiple of block {self.block}, got {self.segment!r}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`, with an order of keys for every batch and head."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        importance = sampled_weights(q, k, probe_rows(grid, self.rows, q.device)).mean(2)
        kv_order = sort_in_segments(order, grid, importance, self.segment)
        keys = kv_order.permute(k)
        if self.antidiagonal:
            sizes = order.geometry
            scores = antidiagonal_scores(q, keys, order.offsets, order.offsets, q_blocks=sizes, k_blocks=sizes)
        else:
            scores = pooled_scores(q, keys, order, order)
        if self.density is None:
            kept = keep_text(top_p(scores, self.threshold), grid, order.offsets, order.offsets)
        else:
            kept = select_density(scores, self.density, order, order, grid)
        return AttentionPlan(order, kv_order, BlockMask.from_bool(kept, order.offsets, order.offsets))
