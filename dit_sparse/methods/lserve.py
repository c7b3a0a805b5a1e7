"""LServe: half of the heads keep a sink and a window, the others the pages whose bounds promise most.

Source: Yang et al., "LServe: Efficient Long-sequence LLM Serving with Unified Sparse Attention", arXiv 2502.14866.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import (
    Ranking,
    block_extremes,
    block_sums,
    probe_rows,
    sampled_weights,
    sink_and_nearness,
)
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenOrder


@dataclass(frozen=True)
class LServe(AnyGrid):
    """Streaming heads keep the first `sink` blocks and the nearest; the others select pages.

    A page is a block. The largest product that a query could have with a key of a page is bounded by the largest and
    the smallest value of each channel: sum over c of max(q_c min_c, q_c max_c). Bounds are taken on logical pages of
    `page` tokens, and a block is worth the largest bound of its logical pages, for the mean query.

    Streaming are those `streaming` of the heads in whose sink and window `rows` queries find most of their attention.

    Differs from the paper: a whole block of queries selects, by its mean, instead of a single one while decoding; not
    causal; streaming heads are chosen at every plan, by mass, instead of by trained gates; they keep `density` like the
    others, where the paper's are next to free; text is kept.

    Raises:
        ValueError: a density outside (0, 1], streaming outside [0, 1], or a number below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    streaming: float = field(default=0.5, metadata={"help": "share of the heads that keep a sink and a window"})
    block: int = field(default=64, metadata={"help": "tokens a block, the physical page"})
    page: int = field(default=16, metadata={"help": "tokens of a logical page, on which bounds are taken"})
    sink: int = field(default=1, metadata={"help": "blocks at the start that streaming heads keep"})
    rows: int = field(default=64, metadata={"help": "queries whose attention tells which heads stream"})

    name: ClassVar[str] = "lserve"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "LServe (arXiv 2502.14866), streaming heads and hierarchical paging"
    described: ClassVar[Description] = Description(
        order="raster",
        score="sink and nearness, or the bound of mean q on the smallest and largest keys of 16 tokens",
        selection="equally many a query block, text kept; half of the heads stream, by the mass of 64 queries",
        differs="blocks of queries select; streaming heads are chosen online and keep the same density",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        for name in ("page", "sink", "rows"):
            check_count(name, getattr(self, name))
        if not 0 <= self.streaming <= 1:
            raise ValueError(f"streaming must be from 0 to 1, got {self.streaming!r}: 0.5 is the paper's")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        window = Ranking(sink_and_nearness(order, grid, self.sink), order, order, grid).select(self.density)
        pages = Ranking(page_bounds(q, k, order, self.page), order, order, grid).select(self.density)
        rows = probe_rows(grid, self.rows, q.device)
        mass = block_sums(sampled_weights(q, k, rows), order.offsets)
        row_blocks = torch.searchsorted(order.offsets[0, 0, 1:].contiguous(), rows.int(), right=True)
        recall = (mass * window[:, :, row_blocks]).sum((-1, -2))
        recall = recall if site.heads is None else site.heads.gather(recall)
        rank = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
        streams = rank < round(self.streaming * recall.shape[1])
        streams = streams if site.heads is None else site.heads.own(streams)
        return AttentionPlan.from_kept(order, torch.where(streams[..., None, None], window, pages))


def page_bounds(q: Tensor, k: Tensor, order: TokenOrder, page: int) -> Tensor:
    """Largest bound of the products of mean queries with the keys of each block's logical pages, `[B, H, M, M]`."""
    means = pooled_blocks(q, order.offsets).float()
    least, most = block_extremes(k, order, page)
    # The larger of the two products is with the largest key where q is above 0, and with the smallest where below.
    bounds = means.clamp(min=0) @ most.flatten(2, 3).transpose(-1, -2)
    bounds += means.clamp(max=0) @ least.flatten(2, 3).transpose(-1, -2)
    return bounds.unflatten(-1, most.shape[2:4]).amax(-1)
