"""Skip-softmax: every block's scores, but weights and values only of those that may matter.

Source: Yuan et al., "BLASST: Dynamic BLocked Attention Sparsity via Softmax Thresholding", arXiv 2512.12087.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_skip_factor, skip_threshold
from dit_sparse.methods.raster_or_tiles import RasterOrTiles
from dit_sparse.types import AttentionPlan, Previous, Scope, Site


@dataclass(frozen=True)
class SkipSoftmax(RasterOrTiles):
    """Keeps every block; the kernel skips a key block whose scores are all far below the running maximum.

    Far is below `scale_factor / tokens` of the weight at the maximum (algorithm 1; the factor is the paper's `a`, whose
    calibration finds the threshold to be the inverse of the length). Nothing is planned. What is skipped depends on the
    data; its share is in the statistics, and a skipped pair counts as half a pair in densities. Text is skipped as
    anything else.

    Differs from the paper: not causal; one factor for all heads and layers, unless `layer_thresholds` gives each layer
    its own; the threshold is at most 1.

    Raises:
        ValueError: a factor below 0, a block below 1, or a tile that is not three positive sizes.
    """

    scale_factor: float = field(
        default=100.0, metadata={"help": "the threshold times the tokens of the sequence; 0 skips nothing"}
    )
    block: int = field(default=64, metadata={"help": "tokens a block, where no tile is given"})
    tile: tuple[int, int, int] | None = field(
        default=None, metadata={"help": "order the video by tiles of this size, one tile a block; none: raster"}
    )

    name: ClassVar[str] = "skip"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "BLASST (arXiv 2512.12087), algorithm 1"
    described: ClassVar[Description] = Description(
        order="raster, or 3-D tiles",
        score="exact, in the kernel",
        selection="blocks below a share of the running maximum in every row are skipped",
        differs="the threshold is at most 1; text is skipped too",
    )
    control: ClassVar[str] = "scale_factor"
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_skip_factor("scale_factor", self.scale_factor)
        self.check_blocks()

    @property
    def own_skip_factor(self) -> float:
        """By which a schedule knows that plans skip."""
        return self.scale_factor

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan with every block kept; of `q, k, v` `[B, H, N, D]` only the device matters."""
        order = self.order(site.grid, q.device)
        threshold = skip_threshold(self.scale_factor, site.grid.num_tokens)
        return AttentionPlan(order, order, BlockMask.full(order.offsets, order.offsets), skip_threshold=threshold)
