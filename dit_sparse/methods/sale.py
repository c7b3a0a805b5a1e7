"""SALE: logits of 4-bit queries and keys, relative to those in a sink and a window, tell which blocks matter.

Source: Ji et al., "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling",
arXiv 2505.24179.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import Ranking, keep_text, peak_logits, text_blocks
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder

_LARGEST = 7  # of a symmetric 4-bit integer


@dataclass(frozen=True)
class Sale(AnyGrid):
    """A block is kept if one of its pairs has a large relative attention score.

    That score is exp(q . k - m), where m is the query's largest logit in the blocks that are always kept: the first
    `sink` ones and `window` ones around its own. Both are estimated from queries and keys rounded to 4 bits, keys less
    their mean, which changes no softmax.

    With a `density` every row keeps the blocks of the largest relative scores. With `density=None` it keeps those of at
    least `threshold`.

    Differs from the paper: not causal; every `row_stride`-th query of a block is looked at instead of all; each token
    has its own scale; products of the rounded values are computed in float32, for there is no 4-bit kernel here, so
    choices are the paper's and the cost is not; one threshold for all heads instead of one a head, calibrated; text is
    kept.

    Raises:
        ValueError: a share outside (0, 1], or a number below 1.
    """

    density: float | None = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included; none: by threshold"}
    )
    threshold: float = field(default=0.004, metadata={"help": "relative attention score from which a block is kept"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    sink: int = field(default=1, metadata={"help": "blocks at the start that are always kept"})
    window: int = field(default=1, metadata={"help": "blocks on either side of a query's own that are always kept"})
    row_stride: int = field(default=8, metadata={"help": "reads every n-th query of a block; 1 reads all"})

    name: ClassVar[str] = "sale"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "SALE (arXiv 2505.24179), relative attention score"
    described: ClassVar[Description] = Description(
        order="raster",
        score="largest 4-bit logit of a block, less the query's largest in sink and window, every eighth query",
        selection="sink and window, then equally many a query block, or all above a threshold; text kept",
        differs="not causal; every eighth query; 4-bit values in float32 products; one threshold for all heads",
    )
    control: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        for name in ("threshold",) if self.density is None else ("threshold", "density"):
            check_share(name, getattr(self, name))
        check_block("block", self.block)
        check_count("sink", self.sink)
        check_count("window", self.window, least=0)
        check_count("row_stride", self.row_stride)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`."""
        grid, order = site.grid, raster_once(site.grid, self.block, q.device)
        always = sink_and_window(order, grid, self.sink, self.window)
        rough_q, rough_k = round_to_4_bits(q), round_to_4_bits(k.float() - k.float().mean(2, keepdim=True))
        relative = peak_logits(rough_q, rough_k, order, order, stride=self.row_stride, reference=always)
        if self.density is None:
            kept = keep_text(always | (relative.exp() >= self.threshold), grid, order.offsets, order.offsets)
        else:
            kept = Ranking(relative.masked_fill(always, float("inf")), order, order, grid).select(self.density)
        return AttentionPlan.from_kept(order, kept)


def round_to_4_bits(x: Tensor) -> Tensor:
    """`x` `[B, H, N, D]` rounded to 15 even steps between plus and minus each token's largest magnitude, in float32."""
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (x / step).round() * step


def sink_and_window(order: TokenOrder, grid: TokenGrid, sink: int, window: int) -> Tensor:
    """`[M, M]` bool: the first `sink` video blocks as keys, and `window` blocks of the same kind around each one."""
    is_text = text_blocks(grid, order.offsets)[0, 0]
    number = torch.arange(len(is_text), device=is_text.device)
    near = ((number[:, None] - number).abs() <= window) & (is_text[:, None] == is_text)
    return near | (~is_text & ((~is_text).cumsum(0) <= sink))
