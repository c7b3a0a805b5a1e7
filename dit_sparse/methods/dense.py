"""Every block kept: the baseline that all methods are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.reorder import raster_order
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class Dense(AnyGrid):
    """Full attention, as one plan that keeps every block; kernels see that it is full and run dense."""

    name: ClassVar[str] = "dense"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Attention Is All You Need (arXiv 1706.03762), equation 1"
    described: ClassVar[Description] = Description("raster", "none", "all of them")
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan with every block of the raster order kept."""
        order = raster_order(site.grid, block_size=128, device=q.device)
        return AttentionPlan(order, order, BlockMask.full(order.offsets, order.offsets))
