"""How a neighborhood mask falls on 3-D tiles: exact counts of visited and cut tiles, what they cost, and the best tile.

Windows and tiles are both products over the axes, so every count is a product of three counts along one axis. Nothing
of the size of the sequence is made, and no GPU is needed.

Source: the analytical model of Generalized Neighborhood Attention (arXiv 2504.16922, section 3), which bounds the
speed-up of a setting by the key tiles that each query tile visits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.masks.neighborhood import Axes, AxisWindow, NeighborhoodPredicate
from dit_sparse.types import TokenOrder

_BLOCKS = (64, 128)


@dataclass(frozen=True)
class TileCost:
    """Time of a visited tile, in units of the same area of the fastest dense attention.

    Args:
        block_128, block_64: of a tile of up to 128 and up to 64 tokens; smaller tiles are padded to these.
        cut: factor for a tile of which the window cuts a part.

    Measured with the `hopper` kernel, alone (`docs/benchmarks.md`).
    """

    block_128: float = 1.1
    block_64: float = 1.25
    cut: float = 2.5

    def of(self, tile: Axes) -> float:
        """Time of one visited pair of tiles, in query-key pairs of dense attention; tiles are padded to blocks."""
        block, factor = (_BLOCKS[0], self.block_64) if prod(tile) <= _BLOCKS[0] else (_BLOCKS[1], self.block_128)
        return factor * (block * -(-prod(tile) // block)) ** 2


@dataclass(frozen=True)
class TileCounts:
    """A neighborhood on tiles.

    Args:
        tile: tokens along frames, height and width.
        total: pairs of query and key tiles, text blocks included.
        visited: pairs of which at least one query sees one key.
        cut: visited pairs of which not every query sees every key.
        pairs: query-key token pairs that are seen, text included.
        computed: query-key token pairs in visited tiles.
        tokens: of the sequence.
    """

    tile: Axes
    total: int
    visited: int
    cut: int
    pairs: int
    computed: int
    tokens: int

    @property
    def density(self) -> float:
        """Share of the query-key pairs that are seen."""
        return self.pairs / self.tokens**2

    @property
    def computed_density(self) -> float:
        """Share of the query-key pairs in visited tiles: what a mask rounded to blocks keeps."""
        return self.computed / self.tokens**2

    @property
    def ideal_speedup(self) -> float:
        """Over dense attention, if only the pairs that are seen took time."""
        return 1 / self.density

    @property
    def tile_speedup(self) -> float:
        """Over dense attention on the same tiles, if visited tiles took equal time: the paper's upper bound."""
        return self.total / self.visited

    def expected_speedup(self, cost: TileCost | None = None, exact: bool = True) -> float:
        """Over the fastest dense attention, permutation not counted; `exact` masks cut tiles, else they run whole."""
        cost = TileCost() if cost is None else cost
        extra = self.cut * (cost.cut - 1) if exact else 0.0
        return self.tokens**2 / ((self.visited + extra) * cost.of(self.tile))


def count_tiles(mask: NeighborhoodPredicate, tile: Axes) -> TileCounts:
    """Counts of the neighborhood `mask` on tiles of `tile` tokens along frames, height and width."""
    axes = [axis_counts(axis, size) for axis, size in zip(mask.axes, tile, strict=True)]
    tiles, visited, whole, pairs, computed = (prod(count) for count in zip(*axes, strict=True))
    grid = mask.grid
    text_tiles = -(-grid.text_len // prod(tile))
    with_text = text_tiles * (2 * tiles + text_tiles)
    text_pairs = grid.num_tokens**2 - grid.video_len**2
    return TileCounts(
        tile,
        total=tiles**2 + with_text,
        visited=visited + with_text,
        cut=visited - whole,
        pairs=pairs + text_pairs,
        computed=computed + text_pairs,
        tokens=grid.num_tokens,
    )


def tile_pairs(mask: NeighborhoodPredicate, tile: Axes, order: TokenOrder) -> Tensor:
    """How many query-key token pairs of each pair of blocks the neighborhood `mask` keeps.

    Args:
        mask: the neighborhood.
        tile: tokens along frames, height and width.
        order: the grid's `tile_order` with that `tile`.

    Returns:
        `[1, 1, M, M]` float64 on the order's device, text counted as seeing and seen.
    """
    sizes = order.block_sizes.double()
    pairs = sizes[..., :, None] * sizes[..., None, :]
    # Counts are small whole numbers, so their products are exact in float64.
    f, h, w = (_axis_pairs(axis, size).double() for axis, size in zip(mask.axes, tile, strict=True))
    video = torch.einsum("ad,be,cf->abcdef", f, h, w).flatten(3).flatten(0, 2).to(pairs.device)
    first = pairs.shape[-1] - len(video) if mask.grid.text_first else 0
    pairs[..., first : first + len(video), first : first + len(video)] = video
    return pairs


def best_tile(mask: NeighborhoodPredicate, exact: bool = True, cost: TileCost | None = None) -> Axes:
    """The tile of at most 128 tokens with the largest expected speed-up; of equal ones the most nearly cubic.

    Args:
        mask: the neighborhood.
        exact: whether tiles that a window cuts are masked, or computed whole.
        cost: of a tile.
    """
    counts = (count_tiles(mask, tile) for tile in tiles_for(mask.grid.shape))
    best = max(counts, key=lambda c: (round(c.expected_speedup(cost, exact), 9), -sum(c.tile), c.tile))
    return best.tile


def tiles_for(shape: Axes) -> list[Axes]:
    """Every tile of 128 tokens or fewer that fits a grid and nearly fills a block of 64 or of 128."""
    longest = _BLOCKS[-1]
    tiles = [
        (f, h, w)
        for f in range(1, min(shape[0], longest) + 1)
        for h in range(1, min(shape[1], longest // f) + 1)
        for w in range(1, min(shape[2], longest // (f * h)) + 1)
    ]
    full = [tile for tile in tiles if any(0.75 * block <= prod(tile) <= block for block in _BLOCKS)]
    # A grid of fewer tokens than a block is one tile.
    return full or [shape]


class AxisCounts(NamedTuple):
    """Along one axis: tiles, pairs of them visited and seen whole, pairs of coordinates seen and in visited tiles."""

    tiles: int
    visited: int
    whole: int
    pairs: int
    computed: int


@lru_cache(maxsize=1 << 14)
def axis_counts(axis: AxisWindow, tile: int) -> AxisCounts:
    """Counts along one `axis` cut in tiles of `tile` tokens; those of a grid are their products."""
    pairs = _axis_pairs(axis, tile)
    sizes = _bounds(axis.length, tile).diff()
    areas = sizes[:, None] * sizes[None, :]
    counts = (pairs > 0), (pairs == areas), pairs, areas * (pairs > 0)
    return AxisCounts(len(sizes), *(int(count.sum()) for count in counts))


def _axis_pairs(axis: AxisWindow, tile: int) -> Tensor:
    """`[T, T]` int64: how many pairs of coordinates of two tiles along an axis are seen, query first."""
    query = torch.arange(axis.length)
    group, start, end = (x[:, None] for x in axis.bounds(query))
    # Places of the group before each bound, limited to the window: their differences are the keys in each tile.
    before = (_bounds(axis.length, tile) - group + axis.dilation - 1) // axis.dilation
    seen = torch.minimum(before.maximum(start), end).diff(dim=-1)
    pairs = torch.zeros(seen.shape[1], seen.shape[1], dtype=torch.int64)
    return pairs.index_add_(0, query // tile, seen)


def _bounds(length: int, tile: int) -> Tensor:
    """`[T + 1]` int64 bounds of the tiles along an axis."""
    return torch.arange(0, length + tile, tile).clamp_(max=length)
