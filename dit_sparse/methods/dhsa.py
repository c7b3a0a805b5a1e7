"""DHSA: chunks of the grid stand for their tokens, and queries attend to the chunks most like their own.

Source: Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
arXiv 2510.24606.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import select_density
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_share, check_tile, freeze_lists
from dit_sparse.reorder import tiles_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class Dhsa(AnyGrid):
    """Chunks are tiles of the video; one is worth the product of chunk vectors, each a mean times the root of its size.

    The root keeps chunks of unlike length comparable: a mean over few tokens varies more, and counts for less. Every
    token inherits the scores of its chunk, so keeping the best keys of a query is keeping the best chunks.

    Differs from the paper: chunks are tiles of the grid instead of stretches between boundaries that a trained network
    predicts; not causal; equally many chunks a query by `density` instead of a number of tokens; text is kept.

    Raises:
        ValueError: a density outside (0, 1], or a tile that is not three positive sizes.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    tile: tuple[int, int, int] = field(
        default=(2, 8, 8), metadata={"help": "tokens of a chunk along frames, height, width; one chunk is one block"}
    )

    name: ClassVar[str] = "dhsa"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "DHSA (arXiv 2510.24606), chunk similarity"
    described: ClassVar[Description] = Description(
        order="3-D tiles, one tile a chunk",
        score="product of means times the roots of both sizes",
        selection="equally many a query block, text kept",
        differs="chunks are tiles instead of predicted; not causal; training-free",
    )
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_share("density", self.density)
        check_tile(self.tile)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by tiles."""
        return tiles_once(grid, self.tile, device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]`."""
        order = self.shared_order(site.grid, q.device)
        if not site.in_order:
            q, k = order.permute(q), order.permute(k)
        root = order.block_sizes[..., None].float().sqrt()
        q_chunks, k_chunks = (pooled_blocks(x, order.offsets).float() * root for x in (q, k))
        scores = q_chunks @ k_chunks.transpose(-1, -2)
        return AttentionPlan.from_kept(order, select_density(scores, self.density, order, order, site.grid))
