"""The oracle: the best block mask that there is at a density, the upper bound for every method with the same blocks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels import block_mass, dense_attention
from dit_sparse.masks import best_blocks
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_share
from dit_sparse.methods.raster_or_tiles import RasterOrTiles
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class Oracle(RasterOrTiles):
    """The blocks that hold the most attention, of all heads together, by the true attention of every call.

    No choice of as many query-key pairs in the same blocks recalls more attention mass: an upper bound, not a speed-up,
    for it computes dense attention first. Text and the heaviest block of every row are kept.

    Mass is the sum of the attention weights of a block (equation 1 of the paper); that of a block is exact, but the
    error of the output also depends on the values, and may be less for another choice.

    Raises:
        ValueError: a density outside (0, 1], a block below 1, or a tile that is not three positive sizes.
    """

    density: float = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included; a mean over heads"}
    )
    block: int = field(default=64, metadata={"help": "tokens a block, where no tile is given"})
    tile: tuple[int, int, int] | None = field(
        default=None, metadata={"help": "order the video by tiles of this size, one tile a block; none: raster"}
    )

    name: ClassVar[str] = "oracle"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "attention weights of Attention Is All You Need (arXiv 1706.03762), equation 1"
    described: ClassVar[Description] = Description(
        order="raster, or 3-D tiles",
        score="exact attention mass a pair, of the call itself",
        selection="the best of all heads together, whatever their row, text kept",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_share("density", self.density)
        self.check_blocks()

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the dense attention of `q, k, v` `[B, H, N, D]`."""
        order = self.order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        lse = dense_attention(q, k, v, return_lse=True)[1]
        mass = block_mass(
            q,
            k,
            lse,
            order.offsets,
            order.offsets,
            scale=q.shape[-1] ** -0.5,
            q_blocks=order.geometry,
            k_blocks=order.geometry,
        )
        mass = mass if site.heads is None else site.heads.gather(mass)
        kept = best_blocks(mass, self.density, order.offsets, order.offsets, site.grid)
        return AttentionPlan.from_kept(order, kept if site.heads is None else site.heads.own(kept))
