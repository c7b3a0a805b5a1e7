"""The settings of a neighborhood that keep a wanted density, are fast and reach far, found by counting alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from dit_sparse.masks.neighborhood import Axes, AxisWindow, neighborhood_predicate
from dit_sparse.masks.tiling import TileCost, TileCounts, axis_counts, count_tiles, tiles_for
from dit_sparse.types import TokenGrid

# Settings this near count as equal, and the shape of the window decides.
_EQUAL = 0.02
# Share of the efficiency of whole tiles that a setting must have to come before others.
_EFFICIENT = 0.8
# Power of the compactness from density .25 down; none from .5 up, where little is left out and reach decides.
_COMPACT = 0.3
_TOLERANCE = 0.1
_THIN = 16


@dataclass(frozen=True)
class Setting:
    """A window and a stride with the tile that suits them.

    Args:
        window, stride: along frames, height and width.
        counts: of the best tile found.
        expected_speedup: of that tile, exact to the token.
    """

    window: Axes
    stride: Axes
    counts: TileCounts
    expected_speedup: float


@dataclass(frozen=True)
class _Found:
    """A candidate; `rank` orders it among those of all tiles, the smallest first."""

    rank: tuple[float, ...]
    window: Axes
    stride: Axes
    tile: Axes
    speedup: float


def suggest_settings(grid: TokenGrid, density: float, count: int = 5, cost: TileCost | None = None) -> list[Setting]:
    """Settings whose density is near `density`, best first.

    Windows are whole tiles, or the whole axis; strides are 1 or a few tiles. Three things count:

    - the efficiency, which is the expected speed-up over the ideal one;
    - the reach: a stride of s leaves every query of its group a sliding window of w - s + 1 around it at least, and
      this is the share of the axis that it covers, on the axis where that is least;
    - how compact the tile is: the side of a cube of its volume over its longest side. The tokens of compact tiles are
      more alike, so that a remainder has more of them.

    Settings come first that cut no tile and have four fifths of the efficiency of whole tiles; of them those of the
    largest efficiency times the square root of the reach and a power of the compactness, less by the factor that the
    density is off. The power is 0.3 up to a density of .25 and none from .5 on, where a remainder has little to do.
    Among equals come those whose windows have the grid's proportions, then those of the smallest stride.

    Args:
        grid: the layout of the sequence.
        density: share of the query-key pairs in (0, 1], text included; met within 10% where the grid allows.
        count: how many, each with another window.
        cost: of a tile.

    Raises:
        ValueError: `density` outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be above 0 and at most 1, got {density}: 0.25 keeps a quarter")
    cost = TileCost() if cost is None else cost
    found = [candidate for tile in _tiles(grid) for candidate in _of_tile(grid, tile, density, cost, count)]
    best: dict[Axes, _Found] = {}
    for candidate in sorted(found, key=lambda c: c.rank):
        best.setdefault(candidate.window, candidate)
    return [
        Setting(c.window, c.stride, count_tiles(neighborhood_predicate(grid, c.window, c.stride), c.tile), c.speedup)
        for c in list(best.values())[:count]
    ]


def _tiles(grid: TokenGrid) -> list[Axes]:
    """Tiles for the cost model to choose from, without those that are long and thin, which only take time to count."""
    tiles = tiles_for(grid.shape)
    several = [axis for axis, length in enumerate(grid.shape) if length > 1]
    compact = [t for t in tiles if max(t[a] for a in several) <= _THIN * min(t[a] for a in several)] if several else []
    return compact or tiles


def _of_tile(grid: TokenGrid, tile: Axes, density: float, cost: TileCost, count: int) -> list[_Found]:
    """The best candidates on one tile, enough that `count` windows are among them."""
    axes = [_candidates(length, size) for length, size in zip(grid.shape, tile, strict=True)]
    counts = [
        np.array([axis_counts(axis, size) for axis in choices], dtype=np.float64)
        for choices, size in zip(axes, tile, strict=True)
    ]
    all_pairs = grid.num_tokens**2
    f, h, w = (along[:, 3] for along in counts)
    reached = (f[:, None, None] * h[:, None] * w + all_pairs - grid.video_len**2) / all_pairs
    gap = np.abs(np.log(reached / density))
    # Only what is near enough is looked at any further: `[3, C]` candidates of each axis, and columns of them all.
    chosen = np.array(np.nonzero(gap <= max(_TOLERANCE, gap.min())))
    reached, gap = reached[tuple(chosen)], gap[tuple(chosen)]
    tiles, visited, whole, _, _ = np.prod([along[at] for along, at in zip(counts, chosen, strict=True)], axis=0).T
    text = -(-grid.text_len // prod(tile))
    time = (visited + text * (2 * tiles + text) + (visited - whole) * (cost.cut - 1)) * cost.of(tile)
    sizes = [np.array([[axis.window, axis.stride] for axis in choices]) for choices in axes]
    windows, strides = np.stack([size[at] for size, at in zip(sizes, chosen, strict=True)]).transpose(2, 1, 0)
    shares = _without_single_axes(windows / np.array(grid.shape), grid)
    efficiency = all_pairs / time * reached
    slow = efficiency * min(cost.block_128, cost.block_64) < _EFFICIENT
    compactness = _compactness(tile, grid) ** (_COMPACT * min(1.0, max(0.0, 2 - 4 * density)))
    merit = efficiency * _reach(windows, strides, grid) ** 0.5 * compactness * np.exp(-gap)
    keys = (
        np.where(gap <= _TOLERANCE, 0.0, gap),
        (slow | (visited > whole)).astype(np.float64),
        -np.round(merit / _EQUAL),
        shares.max(1) / shares.min(1),
        strides.prod(1).astype(np.float64),
        gap,
    )
    ranked = np.lexsort(keys[::-1])
    # Each window once, with its best stride.
    _, places = np.unique(np.ravel_multi_index(windows[ranked].T, np.array(grid.shape) + 1), return_index=True)
    first = ranked[np.sort(places)[:count]]
    return [
        _Found(
            tuple(float(key[i]) for key in keys),
            _axes(windows[i]),
            _axes(strides[i]),
            tile,
            float(all_pairs / time[i]),
        )
        for i in first
    ]


def _reach(windows: np.ndarray, strides: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """`[C]` share of an axis that every query sees around itself at least, on the axis where that is least."""
    lengths = np.array(grid.shape)
    held = np.where(windows == lengths, lengths, windows - strides + 1)
    return _without_single_axes(held / lengths, grid).min(1)


def _compactness(tile: Axes, grid: TokenGrid) -> float:
    """Side of a cube (a square, in an image) as large as `tile`, over the longest side of `tile`."""
    sides = [side for side, length in zip(tile, grid.shape, strict=True) if length > 1] or [1]
    return float(prod(sides) ** (1 / len(sides)) / max(sides))


def _without_single_axes(shares: np.ndarray, grid: TokenGrid) -> np.ndarray:
    """`shares` `[C, 3]` of the axes that can be shared at all; an axis of one token is always seen whole."""
    several = [length > 1 for length in grid.shape]
    return shares[:, several] if any(several) else shares


def _axes(values: np.ndarray) -> Axes:
    f, h, w = values.tolist()
    return f, h, w


def _candidates(length: int, tile: int) -> list[AxisWindow]:
    """Windows of whole tiles and of the whole axis, each sliding or moving by a few tiles."""
    if length == 1:
        return [AxisWindow(1, 1, 1, 1, False)]
    windows = dict.fromkeys([*range(tile, length, tile), length])
    strides = sorted({1, tile, 2 * tile, 4 * tile})
    return [AxisWindow(length, w, s, 1, False) for w in windows for s in strides if s <= w]
