"""Strided attention: a window, every n-th block, and the first ones as a sink, the same for every input.

Source: Child et al., "Generating Long Sequences with Sparse Transformers", arXiv 1904.10509; the sink is that of Xiao
et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453.
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
from dit_sparse.methods.parameters import check_block, check_count, check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid


@dataclass(frozen=True)
class Strided(AnyGrid):
    """Every block of queries sees the blocks nearest to it and every `stride`-th from its own on (section 4.2).

    With a stride of one frame the strided blocks are the same place in other frames. The first `sink` blocks of the
    video are seen by all. Of the blocks that a row keeps, `window_share` are the nearest, after the sink; then come the
    strided ones, the nearest first, and blocks by nearness if there is room left.

    Differs from the paper: bidirectional; both patterns in every head instead of one each; blocks instead of tokens; a
    sink; by default the stride is one frame, rounded to blocks, or as much longer as the density asks for.

    Raises:
        ValueError: a density outside (0, 1], a window share outside [0, 1], or a block or stride below 1.
    """

    density: float = field(default=0.25, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    window_share: float = field(default=0.5, metadata={"help": "share of a row's blocks that are the nearest"})
    stride: int | None = field(default=None, metadata={"help": "blocks between strided ones; none: one frame"})
    sink: int = field(default=1, metadata={"help": "blocks at the start that everything sees"})

    name: ClassVar[str] = "strided"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sparse Transformers (arXiv 1904.10509), section 4.2; sink of arXiv 2309.17453"
    described: ClassVar[Description] = Description(
        order="raster",
        score="none",
        selection="a window, every n-th block and a sink, text kept",
        differs="bidirectional; both patterns in every head; blocks instead of tokens",
    )
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_share("density", self.density)
        check_block("block", self.block)
        check_count("sink", self.sink, least=0)
        if self.stride is not None:
            check_count("stride", self.stride)
        if not 0 <= self.window_share <= 1:
            raise ValueError(f"window_share must be from 0 to 1, got {self.window_share!r}")

    def stride_for(self, grid: TokenGrid) -> int:
        """Blocks between strided ones: as given, or the multiple of one frame that the density has room for."""
        if self.stride is not None:
            return self.stride
        frame = max(1, round(grid.height * grid.width / self.block))
        blocks = -(-grid.video_len // self.block)
        room = max(1, blocks_a_row(grid, self.density, blocks) - self.sink) * (1 - self.window_share)
        return frame * max(1, round(blocks / frame / max(1.0, room)))

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan that depends on the grid alone."""
        return _plan(self, site.grid, q.device)


@lru_cache(maxsize=16)
def _plan(method: Strided, grid: TokenGrid, device: torch.device) -> AttentionPlan:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        order = raster_once(grid, method.block, device)
        is_text = text_blocks(grid, order.offsets)[0, 0]
        row = blocks_a_row(grid, method.density, int((~is_text).sum()))
        blocks = order.num_blocks
        scores = sink_and_nearness(order, grid, method.sink)
        is_sink = scores > blocks
        window = round(method.window_share * max(0, row - method.sink))
        near = scores.masked_fill(is_sink | is_text, float("-inf"))
        is_near = top_k(near, window) if window else torch.zeros_like(is_sink)
        number = torch.arange(blocks, device=device)
        is_strided = (number[:, None] - number) % method.stride_for(grid) == 0
        # Each kind above the next, and within a kind the nearest first.
        kind = torch.where(is_sink, 3, torch.where(is_near, 2, is_strided.long()))
        scores = sink_and_nearness(order, grid, 0) + blocks * kind
        return AttentionPlan.from_kept(order, Ranking(scores, order, order, grid).select(method.density))
