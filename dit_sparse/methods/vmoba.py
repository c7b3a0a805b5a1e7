"""VMoBA: chunks of frames, of places and of both by turns of the layers, chosen over a whole head.

Source: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import among_text, heaviest_blocks, heaviest_share, keep_text
from dit_sparse.masks.neighborhood import per_axis
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import EVERY_STEP, check_block, check_budget, check_share
from dit_sparse.reorder import grid_order, tile_order
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder

Axes = tuple[int, int, int]


@dataclass(frozen=True)
class VMoBA(AnyGrid):
    """The chunks of largest gate of a head, its own always, until they hold `threshold` of all gates.

    Layers take turns: chunks of whole frames, chunks of a frame's places through all frames, chunks in space and time.
    The gate of a query and a chunk is the query's product with the mean of the chunk's keys. Gates are brought to
    [0, 1] over the head, and sorted over it; the smallest set is kept that with every query's own chunk makes up
    `threshold` of the sum. Text is kept as queries and as keys.

    The control is `threshold`; the density that it comes to is in the statistics. With `density` the chunks of largest
    gate are kept up to that share of the pairs, the last one in part.

    Differs from the paper: training-free use, which it reports too, and therefore a threshold of 0.5 by default instead
    of 0.25; a query block takes the mean of its queries' gates,
    where each query has its own there, so that a block never computes the union of its queries' chunks; chunks' sizes
    are parameters, cut at the borders, and are cut in blocks for the kernels.

    Raises:
        ValueError: a share outside (0, 1], or a size below 1.
    """

    threshold: float = field(default=0.5, metadata={"help": "share of a head's gates that the kept chunks hold"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed, in place of threshold; none: it decides"}
    )
    frames: int = field(default=2, metadata={"help": "frames of a chunk in the first of three layers"})
    place: tuple[int, int] = field(
        default=(4, 8), metadata={"help": "height and width in tokens of a chunk in the second of three layers"}
    )
    tile: int | tuple[int, int, int] = field(
        default=(4, 4, 8), metadata={"help": "frames, height, width of a chunk in the third of three layers"}
    )
    block: int = field(default=64, metadata={"help": "most tokens a block that chunks are cut in"})

    name: ClassVar[str] = "vmoba"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "VMoBA (arXiv 2506.23858)"
    described: ClassVar[Description] = Description(
        order="chunks of frames, of places, of both, by turns of the layers",
        score="mean query times the chunk's mean key, from 0 to 1 over a head",
        selection="own chunk, and the largest of a head up to half of the sum, or by density; text kept",
        cached="orders",
        differs="without training, threshold .5 instead of .25; gates of query blocks instead of queries; other chunks",
    )
    control: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = EVERY_STEP

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_share("threshold", self.threshold)
        check_block("frames", self.frames)
        check_block("block", self.block)
        object.__setattr__(self, "tile", per_axis("tile", self.tile))
        if not isinstance(self.place, (tuple, list)) or len(self.place) != 2:
            raise ValueError(f"place must be two sizes (height, width), got {self.place!r}")
        for side in self.place:
            check_block("place", side)
        object.__setattr__(self, "place", tuple(self.place))

    def chunk(self, grid: TokenGrid, layer: int) -> Axes:
        """Tokens of a chunk along frames, height and width in `layer`."""
        turns = (
            (self.frames, grid.height, grid.width),
            (grid.frames, *self.place),
            per_axis("tile", self.tile),
        )
        return turns[layer % 3]

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the gates of `q, k` `[B, H, N, D]` and the chunks of `site.layer`."""
        grid = site.grid
        parts = _cut(grid, self.chunk(grid, site.layer), self.block, q.device)
        order, inside = parts.order, slice(grid.video_start, grid.video_start + grid.video_len)
        queries = pooled_blocks(order.permute(q)[:, :, inside], parts.blocks).float()
        keys = pooled_blocks(order.permute(k)[:, :, inside], parts.chunks).float()
        gates = queries @ keys.transpose(-1, -2)
        least, most = gates.amin((-1, -2), keepdim=True), gates.amax((-1, -2), keepdim=True)
        gates = (gates - least) / (most - least).clamp_min(torch.finfo(gates.dtype).tiny)
        if self.density is not None:
            # A block's own chunk comes before all others.
            ranked = gates.masked_fill(parts.own, 2.0)[..., parts.chunk_of]
            kept = heaviest_blocks(among_text(ranked, grid, order.num_blocks), self.density, order.offsets, grid)
        else:
            chosen = heaviest_share(gates, parts.own, parts.blocks.diff(), self.threshold)[..., parts.chunk_of]
            kept = keep_text(among_text(chosen, grid, order.num_blocks), grid, order.offsets, order.offsets)
        return AttentionPlan.from_kept(order, kept)


class _Parts(NamedTuple):
    """Chunks of the video, the blocks that they are cut in, and which block lies in which chunk."""

    order: TokenOrder
    blocks: Tensor
    chunks: Tensor
    chunk_of: Tensor
    own: Tensor


@lru_cache(maxsize=64)
def _cut(grid: TokenGrid, chunk: Axes, block: int, device: torch.device) -> _Parts:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        video = tile_order(TokenGrid(*grid.shape), chunk)
        bounds = video.offsets[0, 0].tolist()
        starts, chunk_of = [], []
        for number, (first, end) in enumerate(pairwise(bounds)):
            count = -(-(end - first) // block)
            starts += [first + (end - first) * part // count for part in range(count)]
            chunk_of += [number] * count
        blocks = torch.tensor([*starts, grid.video_len], dtype=torch.int32)
        order = grid_order(grid, video.index, block_size=block, video_offsets=blocks).to(device)
        places = torch.tensor(chunk_of, device=device)
        own = places[:, None] == torch.arange(len(bounds) - 1, device=device)
        return _Parts(order, blocks.to(device)[None, None], video.offsets.to(device), places, own)
