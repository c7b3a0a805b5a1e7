"""DraftAttention: attention of a video at low resolution tells which blocks of the full one to compute.

Source: Shen et al., "DraftAttention: Fast Video Diffusion via Low-Resolution Attention Guidance", arXiv 2505.14708.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import heaviest_blocks, pooled_scores, without_text
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_share
from dit_sparse.reorder import tiles_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class DraftAttention(AnyGrid):
    """The blocks of largest draft attention of a head, whatever their row.

    Queries and keys are averaged over patches of a frame, 8x16 tokens, or 16x8 where it is higher than wide. The draft
    is the softmax of the patches' products over the video; each head keeps its largest values, up to `density`. Tokens
    are put patch by patch, so that a patch is a block. Text is kept as queries and as keys.

    Differs from the paper: every patch keeps at least its best one, where rows can end empty there; a smaller patch at
    the border weighs by its tokens; text counts in the density.

    Raises:
        ValueError: a density outside (0, 1], or a side of the patch below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    short: int = field(default=8, metadata={"help": "tokens of a patch along the shorter side of a frame"})
    long: int = field(default=16, metadata={"help": "tokens of a patch along the longer side"})

    name: ClassVar[str] = "draft"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "DraftAttention (arXiv 2505.14708)"
    described: ClassVar[Description] = Description(
        order="patches of a frame, one a block",
        score="softmax of the products of patch means over the video",
        selection="the largest of a head, whatever their row, text kept",
        differs="a row keeps at least its best block",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("short", self.short)
        check_block("long", self.long)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by patches."""
        sides = (self.short, self.long) if grid.height < grid.width else (self.long, self.short)
        return tiles_once(grid, (1, *sides), device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the draft of `q, k` `[B, H, N, D]`, in the order by patches where `site.in_order` is set."""
        order = self.shared_order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        draft = without_text(pooled_scores(q, k, order, order), site.grid, order.offsets)
        draft = draft / draft.sum(-1, keepdim=True).clamp_min(torch.finfo(draft.dtype).tiny)
        return AttentionPlan.from_kept(order, heaviest_blocks(draft, self.density, order.offsets, site.grid))
