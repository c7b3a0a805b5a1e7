"""Radial attention: the further two frames are apart, the narrower the band between them.

Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
arXiv 2506.19852.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.masks import among_text, heaviest_blocks, keep_text, spread_ties
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_budget
from dit_sparse.reorder import frame_bounds, frame_order
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid


@dataclass(frozen=True)
class RadialAttention(AnyGrid):
    """A static mask whose bands halve each time the distance of two frames doubles.

    Neighbouring frames see each other whole. At a distance of d frames of T tokens a query sees the keys within
    `decay` * 2^(bits(T) - bits(d)) places of its own, but at least `block`; where 2^(bits(T) - bits(d)) is less than a
    block, only every so many-th distance is kept, so that fewer frames stand for narrower bands. The first frame is
    kept whole as a sink, and text as queries and keys. A block is kept where the band covers it well: three fifths of
    the columns that it touches, each to a third, as in the public code.

    The control is `decay`; the density that it comes to is in the statistics. With `density` blocks are kept in the
    order in which they would leave if all bands shrank together, up to that share of the pairs.

    Differs from the paper: blocks never reach over two frames, but share each frame equally; any number of tokens a
    frame. With `density` the sink counts as a frame's own and can shrink.

    Raises:
        ValueError: a density outside (0, 1], a decay that is no positive number, or a block below 1.
    """

    decay: float = field(default=1.0, metadata={"help": "factor of the bands' width beyond neighbouring frames"})
    density: float | None = field(
        default=None, metadata={"help": "share of query-key pairs computed; none: decay decides"}
    )
    block: int = field(default=128, metadata={"help": "most tokens a block, and least width of a band"})
    sink: bool = field(default=True, metadata={"help": "keep the first frame as keys of every query"})

    name: ClassVar[str] = "radial"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Radial Attention (arXiv 2506.19852)"
    described: ClassVar[Description] = Description(
        order="raster, blocks that share a frame equally",
        score="none, or by density how long a block stays as bands shrink",
        selection="bands that halve as the distance of frames doubles, the first frame and text kept",
        cached="the mask",
        differs="blocks end with their frame",
    )
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        check_budget(self.density)
        check_block("block", self.block)
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)) or not 0 < self.decay < math.inf:
            raise ValueError(f"decay must be a number above 0, got {self.decay!r}")

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan that depends on the grid of `site` alone."""
        return _plan(self, site.grid, q.device)


@lru_cache(maxsize=16)
def _plan(method: RadialAttention, grid: TokenGrid, device: torch.device) -> AttentionPlan:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        order, bounds = frame_order(grid, method.block), frame_bounds(grid, method.block)
        if method.density is None:
            video = _over_frames(grid, [_band(method, grid, bounds, d) for d in range(grid.frames)])
            if method.sink:
                video[:, : len(bounds) - 1] = True
            kept = keep_text(among_text(video, grid, order.num_blocks)[None, None], grid, order.offsets, order.offsets)
        else:
            scores = _over_frames(grid, [_stay(method, grid, bounds, d) for d in range(grid.frames)])
            if method.sink:
                own = _stay(method, grid, bounds, 0)
                scores[:, : len(own)] = own.repeat(grid.frames, 1)
            ranked = among_text(spread_ties(scores), grid, order.num_blocks)[None, None]
            kept = heaviest_blocks(ranked, method.density, order.offsets, grid)
        return AttentionPlan.from_kept(order, kept).to(device)


def _reach(grid: TokenGrid, distance: int) -> float:
    """Places that a band reaches at a distance of frames, before decay: a power of two, or the whole frame."""
    tokens = grid.height * grid.width
    return float(tokens) if distance <= 1 else 2.0 ** (tokens.bit_length() - distance.bit_length())


def _is_kept(method: RadialAttention, grid: TokenGrid, distance: int) -> bool:
    """Whether frames at this distance are among every so many-th that see each other."""
    return distance % max(1, int(method.block / _reach(grid, distance))) == 0


def _band(method: RadialAttention, grid: TokenGrid, bounds: Tensor, distance: int) -> Tensor:
    """`[m, m]` bool: blocks kept between two frames at a distance."""
    if not _is_kept(method, grid, distance):
        return torch.zeros(len(bounds) - 1, len(bounds) - 1, dtype=torch.bool)
    reach = _reach(grid, distance)
    width = reach if distance <= 1 else max(reach * method.decay, method.block)
    first, last, column = bounds[:-1, None], bounds[1:, None] - 1, torch.arange(int(bounds[-1]))
    rows = (torch.minimum(last, column + int(width)) - torch.maximum(first, column - int(width)) + 1).clamp(min=0)
    touched, covered = rows > 0, 3 * rows > bounds.diff()[:, None]
    touched, covered = (F.pad(x.cumsum(-1), (1, 0))[:, bounds].diff(dim=-1) for x in (touched, covered))
    return 5 * covered > 3 * touched


def _stay(method: RadialAttention, grid: TokenGrid, bounds: Tensor, distance: int) -> Tensor:
    """`[m, m]`: inverse of the factor that all bands must shrink by for a block's middle to leave its band."""
    middle = (bounds[:-1] + bounds[1:] - 1) / 2
    apart = (middle[:, None] - middle).abs().clamp(min=0.5)
    # Frames that are not kept at all come after all others.
    return max(_reach(grid, distance), 1e-3) / apart * (1.0 if _is_kept(method, grid, distance) else 1e-6)


def _over_frames(grid: TokenGrid, by_distance: list[Tensor]) -> Tensor:
    """`[F m, F m]`: the map of their distance for every two frames."""
    frame = torch.arange(grid.frames)
    maps = torch.stack(by_distance)[(frame[:, None] - frame).abs()]
    return maps.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
