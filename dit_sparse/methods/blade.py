"""Video-BLADE's adaptive block-sparse attention: blocks by the peaks of attention among a few of their tokens.

Source: Gu et al., "Video-BLADE: Block-Sparse Attention Meets Step Distillation for Efficient Video Generation",
arXiv 2508.10774.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import keep_text, sampled_peaks, select_density, top_p, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget, check_count, check_share
from dit_sparse.reorder import curve_once
from dit_sparse.types import AttentionPlan, Previous, Remainder, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class Blade(AnyGrid):
    """The blocks of highest peaks of a row, up to a share of their sum, within bounds.

    Tokens follow a space-filling curve. Attention is computed among `samples` tokens of each block, and a block's score
    is its largest weight. Each query block keeps the smallest set of key blocks that reaches `top_p` of the row's
    scores, but at least `min_kept` and at most `max_kept` of its key blocks. Text is kept as queries and as keys.

    The controls are `top_p` and its bounds; the density that it comes to is in the statistics. With `density` every
    query block keeps equally many key blocks instead, so that it is met.

    With `global_branch` every query also attends to the mean of each block that its block does not keep, with the log
    of the block's size added to the score: the remainder "mean".

    Differs from the paper: used without training, and without its step distillation; the global branch there is
    attention to the means of all runs of 30 tokens in a kernel of its own, merged by the row LSE, which counts the kept
    tokens twice, and here it is part of the same softmax, over whole blocks; it is off unless asked for. At most a
    quarter is kept instead of 17% (Wan) or 10% (CogVideoX), because the model is not trained for less; samples are at
    equal distances instead of random; the block that crosses `top_p` is kept.

    Raises:
        ValueError: a share outside (0, 1], a `min_kept` above `max_kept`, or a block or number of samples below 1.
    """

    top_p: float = field(default=0.95, metadata={"help": "share of a row's scores that its key blocks reach"})
    min_kept: float = field(default=0.05, metadata={"help": "least share of the key blocks kept, under top_p"})
    max_kept: float = field(default=0.25, metadata={"help": "largest share of the key blocks kept, under top_p"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of top_p; none: top_p decides"}
    )
    block: int = field(default=128, metadata={"help": "tokens a block"})
    samples: int = field(default=32, metadata={"help": "tokens of a block that attention is computed among"})
    global_branch: bool = field(default=False, metadata={"help": "whether means of the other blocks are attended too"})

    name: ClassVar[str] = "blade"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Video-BLADE (arXiv 2508.10774)"
    described: ClassVar[Description] = Description(
        order="space-filling curve",
        score="largest attention weight among 32 tokens a block",
        selection="top-p of a row within bounds, or equally many a row by density; text kept",
        differs="no distillation; the global branch, if asked for, over means of whole blocks that are not kept; at "
        "most a quarter kept; samples at equal distances",
    )
    control: ClassVar[str] = "top_p"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_budget(self.density)
        for name in ("top_p", "min_kept", "max_kept"):
            check_share(name, getattr(self, name))
        if self.min_kept > self.max_kept:
            raise ValueError(f"min_kept must be at most max_kept, {self.max_kept}, got {self.min_kept}")
        check_block("block", self.block)
        check_count("samples", self.samples)

    @property
    def own_remainder(self) -> Remainder:
        """What stands in for the blocks that are not kept."""
        return "mean" if self.global_branch else "none"

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order along the curve."""
        return curve_once(grid, self.block, device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from peaks of `q, k` `[B, H, N, D]`, which stand along the curve where `site.in_order` is set."""
        grid, order = site.grid, self.shared_order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        scores = sampled_peaks(q, k, order, order, self.samples)
        if self.density is not None:
            kept = select_density(scores, self.density, order, order, grid)
            return AttentionPlan.from_kept(order, kept, remainder=self.own_remainder)
        video_blocks = -(-grid.video_len // self.block)
        least, most = (max(1, int(share * video_blocks)) for share in (self.min_kept, self.max_kept))
        kept = top_p(without_text(scores, grid, order.offsets), self.top_p, least, most)
        kept = keep_text(kept, grid, order.offsets, order.offsets)
        return AttentionPlan.from_kept(order, kept, remainder=self.own_remainder)
