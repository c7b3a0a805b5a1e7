"""What a figure of fidelity has to be compared with: blocks that nobody chose."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import select_density
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.parameters import check_block, check_share
from dit_sparse.reorder import raster_order
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class RandomBlocks(AnyGrid):
    """Random key blocks, equally many a query block, in every layer and guidance branch others; text is kept.

    No method to use: what is left of a video at a density when the choice of blocks is worth nothing. It is in no list
    of methods.

    Raises:
        ValueError: a density outside (0, 1], or a block below 1.
    """

    density: float
    block: int = 64
    seed: int = 0

    name: ClassVar[str] = "random-blocks"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = ""
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q` `[B, H, N, D]`, the same whenever `seed` and the place in the run are."""
        order = raster_order(site.grid, self.block, device=q.device)
        place = f"{self.seed} {site.model} {site.layer} {site.step} {site.branch}"
        # On the CPU, because a device's own generator would give every device other blocks.
        generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
        scores = torch.rand(*q.shape[:2], order.num_blocks, order.num_blocks, generator=generator).to(q.device)
        return AttentionPlan.from_kept(order, select_density(scores, self.density, order, order, site.grid))
