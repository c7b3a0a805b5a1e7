"""BigBird: a window, a few global blocks and a few random ones, the same for every input.

Source: Zaheer et al., "Big Bird: Transformers for Longer Sequences", arXiv 2007.14062.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import Ranking, blocks_a_row, sink_and_nearness, text_blocks, top_k
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_share
from dit_sparse.reorder import curve_once, raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class BigBird(AnyGrid):
    """Every block of queries sees the blocks nearest to it, the global ones, and random ones (section 2).

    Global blocks, the first of the video, see everything and are seen by everything, as text does. Of the blocks that a
    row keeps, `global_share` are global and `window_share` the nearest; the rest are drawn once and for all.

    Differs from the paper: shares of a density instead of numbers of blocks (2, 3 and 3 there); by default most of it
    is the window, as random blocks are worth little to a video; the window is centred, with no wrap-around at the ends.
    The sequence may be walked along a space-filling curve, so that a window in it is a neighbourhood in space and time.

    Raises:
        ValueError: a density outside (0, 1], shares that are negative or exceed 1 together, or a block below 1.
    """

    density: float = field(default=0.5, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    window_share: float = field(default=0.7, metadata={"help": "share of a row's blocks that are the nearest"})
    global_share: float = field(default=0.15, metadata={"help": "share of a row's blocks that are global"})
    seed: int = field(default=0, metadata={"help": "of the random blocks"})
    curve: bool = field(default=False, metadata={"help": "order the video along a Hilbert curve; false: raster"})

    name: ClassVar[str] = "bigbird"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "BigBird (arXiv 2007.14062), section 2"
    described: ClassVar[Description] = Description(
        order="raster, or a space-filling curve",
        score="none",
        selection="a window, global blocks and random blocks, text kept",
        differs="shares of the density instead of numbers of blocks, most of them the window",
    )
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        for name in ("window_share", "global_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)!r}")
        if self.window_share + self.global_share > 1:
            raise ValueError(
                f"window_share and global_share must be at most 1 together, got {self.window_share} and "
                f"{self.global_share}: what is left is random"
            )

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order along the curve, or raster."""
        return (curve_once if self.curve else raster_once)(grid, self.block, device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan that depends on the grid alone."""
        return _plan(self, site.grid, q.device)


@lru_cache(maxsize=16)
def _plan(method: BigBird, grid: TokenGrid, device: torch.device) -> AttentionPlan:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        order = method.shared_order(grid, device)
        is_text = text_blocks(grid, order.offsets)[0, 0]
        video = int((~is_text).sum())
        row = blocks_a_row(grid, method.density, video)
        is_global = ~is_text & ((~is_text).cumsum(0) <= round(method.global_share * row))
        nearness = sink_and_nearness(order, grid, 0).masked_fill(is_global | is_text, float("-inf"))
        window = round(method.window_share * row)
        is_near = top_k(nearness, window) if window else torch.zeros_like(nearness, dtype=torch.bool)
        generator = torch.Generator().manual_seed(method.seed)
        scores = torch.rand(nearness.shape, generator=generator).to(device)
        # Each kind above the next, the nearest first; random ones are below 1.
        scores = torch.where(is_near, 1 + nearness / order.num_blocks, scores).masked_fill(is_global, 3)
        # Global rows are kept whole afterwards, so the others get what these leave.
        share = float(order.block_sizes[0, 0][is_global].sum()) / grid.video_len
        dropped = (1 - method.density) / max(1 - share, 1e-9)
        kept = Ranking(scores, order, order, grid).select(max(1 - dropped, 1e-9))
        return AttentionPlan.from_kept(order, kept | is_global[:, None])
