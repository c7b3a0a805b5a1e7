"""A space-filling curve through a video grid of any size: a generalised Hilbert curve."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from dit_sparse.reorder.grid import grid_order
from dit_sparse.types import TokenGrid, TokenOrder

Point = tuple[int, int, int]


def curve_order(grid: TokenGrid, block_size: int, device: torch.device | str | None = None) -> TokenOrder:
    """The video along a generalised Hilbert curve, cut in blocks of `block_size`, which so become compact clumps.

    Every two tokens that follow each other are neighbours in the grid, whatever its sizes: all cuts are placed so that
    each part has an even leading side or only odd sides, without which no such path ends where it must.

    Args:
        grid: the layout of the sequence.
        block_size: tokens a block.
        device: where the order lies.

    Returns:
        Order with `index` `[1, 1, N]` int64.

    Raises:
        ValueError: a block size below 1.

    Source: Video-BLADE (arXiv 2508.10774) orders tokens by a Gilbert (generalised Hilbert) curve.
    Differs from the paper: the cuts follow parity, so that no step is diagonal.
    """
    return grid_order(grid, torch.tensor(_curve(grid.shape)), block_size=block_size, device=device)


class _Side(NamedTuple):
    """One side of a box: its axis (0 to 2), its direction (1 or -1), its length."""

    axis: int
    sign: int
    length: int

    def part(self, length: int) -> _Side:
        return self._replace(length=length)

    def rest(self, length: int) -> _Side:
        return self._replace(length=self.length - length)

    def back(self) -> _Side:
        return self._replace(sign=-self.sign)


@lru_cache(maxsize=16)
def _curve(shape: Point) -> tuple[int, ...]:
    """Raster numbers of the grid's tokens along the curve."""
    # An even leading side, or none, lets every later part have one or have only odd sides.
    a, b, c = sorted(
        (_Side(axis, 1, length) for axis, length in enumerate(shape)),
        key=lambda side: (side.length % 2 == 0, side.length),
        reverse=True,
    )
    path: list[Point] = []
    _walk((0, 0, 0), a, b, c, path)
    return tuple((f * shape[1] + h) * shape[2] + w for f, h, w in path)


def _walk(start: Point, a: _Side, b: _Side, c: _Side, path: list[Point]) -> None:
    """Append a path through the box at `start` with sides `a, b, c`, which leaves it at the far end of `a`."""
    if b.length == c.length == 1:
        path.extend(_step(start, a, i) for i in range(a.length))
    elif 2 * a.length > 3 * max(b.length, c.length):
        _walk_halves(start, a, b, c, path)
    elif 3 * b.length > 4 * c.length:
        _walk_bridge(start, a, b, c, path)
    elif 3 * c.length > 4 * b.length:
        _walk_bridge(start, a, c, b, path)
    elif a.length % 2:
        # Five parts of a box with only odd sides cannot all be walked without a diagonal step; three can.
        _walk_bridge(start, a, b, c, path)
    elif c.length % 2 and b.length % 2 == 0:
        _walk_hilbert(start, a, c, b, path)
    else:
        _walk_hilbert(start, a, b, c, path)


def _walk_halves(start: Point, a: _Side, b: _Side, c: _Side, path: list[Point]) -> None:
    """Two halves along `a`."""
    cut = _even_half(a.length)
    _walk(start, a.part(cut), b, c, path)
    _walk(_step(start, a, cut), a.rest(cut), b, c, path)


def _walk_bridge(start: Point, a: _Side, b: _Side, c: _Side, path: list[Point]) -> None:
    """Up along `b`, across along `a`, down along `b`."""
    up, cut = _even_half(b.length), a.length // 2
    end = _step(start, a, a.length - 1)
    _walk(start, b.part(up), c, a.part(cut), path)
    _walk(_step(start, b, up), a, b.rest(up), c, path)
    _walk(_step(end, b, up - 1), b.part(up).back(), c, a.rest(cut).back(), path)


def _walk_hilbert(start: Point, a: _Side, b: _Side, c: _Side, path: list[Point]) -> None:
    """Hilbert's turn in space: along `b`, `c`, `a`, back along `c`, back along `b`."""
    up, deep = _even_half(b.length), _even_half(c.length)
    # With an odd side to walk along, the other two sides of the second and fourth part must be odd as well.
    cut = a.length // 2 | 1 if c.length % 2 else a.length // 2
    end = _step(start, a, a.length - 1)
    far = c.length - 1
    _walk(start, b.part(up), c.part(deep), a.part(cut), path)
    _walk(_step(start, b, up), c, a.part(cut), b.rest(up), path)
    _walk(_step(_step(start, b, up - 1), c, far), a, b.part(up).back(), c.rest(deep).back(), path)
    _walk(_step(_step(end, b, up), c, far), c.back(), a.rest(cut).back(), b.rest(up), path)
    _walk(_step(end, b, up - 1), b.part(up).back(), c.part(deep), a.rest(cut).back(), path)


def _step(point: Point, side: _Side, length: int) -> Point:
    moved = list(point)
    moved[side.axis] += side.sign * length
    return moved[0], moved[1], moved[2]


def _even_half(length: int) -> int:
    """About half of `length` (2 or more), even unless `length` is 2."""
    half = length // 2
    return half if length == 2 or half % 2 == 0 else half + 1
