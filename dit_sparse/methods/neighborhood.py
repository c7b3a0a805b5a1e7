"""Neighborhood attention: each query sees a window of the video around it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from math import log, prod
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.masks import (
    NeighborhoodPredicate,
    Setting,
    best_tile,
    neighborhood_predicate,
    suggest_settings,
    tile_pairs,
)
from dit_sparse.masks.neighborhood import flag_per_axis, per_axis
from dit_sparse.methods.description import Description
from dit_sparse.reorder import tiles_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder

Axes = tuple[int, int, int]


# No window made from a density is smaller, and no axis of this length or less is cut: the frames of a 2x8x8 tile.
_LEAST_WINDOW = (2, 8, 8)
_TOLERANCE = 0.1


@dataclass(frozen=True)
class Neighborhood:
    """A fixed window per axis, with a stride, a dilation and causal axes, on tokens ordered by 3-D tiles.

    Every setting is given for frames, height and width; one value stands for all three. Axes of one token take no
    part, so that an image is a grid of one frame. Text sees everything and is seen by everything.

    Args:
        window: video keys that a query sees; by default made from `density` and the grid.
        stride: queries that share a window: 1 slides, `window` gives blocked attention. Where stride, window and
            grid are multiples of `tile`, no block is partial and the kernel is fastest. By default 1, or with a window
            made from `density` the one that suits it.
        dilation: distance between the keys of a window.
        causal: whether a query sees nothing after itself along an axis.
        tile: tokens of a tile; one tile is one block. By default the one that the cost model finds fastest, or with a
            window made from `density` the one that suits it.
        exact: whether blocks that a window cuts are computed in part, exact to the token, or whole.
        density: share of the video keys that a query sees; only used where `window` is not given. On causal axes
            queries near the start see fewer.

    Raises:
        ValueError: a size below 1, or a `density` outside (0, 1].

    Source: Generalized Neighborhood Attention (arXiv 2504.16922), the definition of NATTEN.
    Differs from the paper: video tokens are not padded to whole tiles; queries and keys share one tile; the default
    window is ours.
    """

    name: ClassVar[str] = "neighborhood"
    version: ClassVar[int] = 4
    paper: ClassVar[str] = "Generalized Neighborhood Attention (arXiv 2504.16922)"
    described: ClassVar[Description] = Description(
        order="3-D tiles, one tile a block",
        score="none",
        selection="a window around every query, exact to the token",
        differs="border tiles are smaller instead of padded; the default window is ours",
    )
    scope: ClassVar[Scope] = "grid"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    window: int | tuple[int, int, int] | None = field(
        default=None,
        metadata={"help": "video keys a query sees along frames, height, width; made from density where not given"},
    )
    stride: int | tuple[int, int, int] | None = field(
        default=None,
        metadata={
            "help": "queries that share a window along frames, height, width; 1 slides; none: chosen with a window "
            "made from density, else 1"
        },
    )
    dilation: int | tuple[int, int, int] = field(
        default=(1, 1, 1), metadata={"help": "distance between the keys of a window along frames, height, width"}
    )
    causal: bool | tuple[bool, bool, bool] = field(
        default=(False, False, False), metadata={"help": "whether a query sees nothing after itself along an axis"}
    )
    tile: int | tuple[int, int, int] | None = field(
        default=None,
        metadata={
            "help": "tokens of a tile along frames, height, width; one tile is one block; none: chosen with a window "
            "made from density, else the fastest"
        },
    )
    exact: bool = field(
        default=True, metadata={"help": "compute blocks that a window cuts to the token; false keeps them whole"}
    )
    density: float = field(
        default=0.5, metadata={"help": "share of the video keys a query sees; ignored where window is given"}
    )

    def __post_init__(self) -> None:
        for name in ("window", "stride", "dilation", "tile"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, per_axis(name, value))
        object.__setattr__(self, "causal", flag_per_axis("causal", self.causal))
        if not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}: 0.25 keeps a quarter")

    @property
    def overridden(self) -> dict[str, str]:
        """A window that is given wins over a density."""
        return {} if self.window is None else {"density": "window"}

    def window_for(self, grid: TokenGrid) -> Axes:
        """The window in use on `grid`: the one given, or one made from `density`.

        Where only the density is given, window, stride and tile are chosen together (`suggest_settings`).
        Else the window is cut to the density alone: an axis no longer than its tile (2x8x8 where none is given) is
        covered whole; the others take equal shares, whose product comes as near to `density` as whole tokens allow. No
        window is smaller than a tile or the stride where the grid has room.
        """
        if self.window is not None:
            return per_axis("window", self.window)
        if (chosen := self._chosen(grid)) is not None:
            return chosen.window
        dilation, stride = per_axis("dilation", self.dilation), self.stride_for(grid)
        tile = _LEAST_WINDOW if self.tile is None else per_axis("tile", self.tile)
        most = [max(1, length // d) for length, d in zip(grid.shape, dilation, strict=True)]
        least = [min(m, max(t, s)) for m, t, s in zip(most, tile, stride, strict=True)]
        shares = _equal_shares(grid.shape, least, most, self.density)
        choices = (
            sorted({max(lo, min(hi, int(share * length) + up)) for up in (0, 1)})
            for share, length, lo, hi in zip(shares, grid.shape, least, most, strict=True)
        )
        wanted = self.density * grid.video_len
        f, h, w = min(product(*choices), key=lambda window: abs(prod(window) - wanted))
        return f, h, w

    def stride_for(self, grid: TokenGrid) -> Axes:
        """The stride in use on `grid`: the one given, the one chosen with the window, or 1."""
        if self.stride is not None:
            return per_axis("stride", self.stride)
        chosen = self._chosen(grid)
        return (1, 1, 1) if chosen is None else chosen.stride

    def _chosen(self, grid: TokenGrid) -> Setting | None:
        """Window, stride and tile for `grid`, where the density alone is given and some setting suits."""
        given = self.window is not None or self.stride is not None or self.tile is not None or self.density == 1
        special = per_axis("dilation", self.dilation) != (1, 1, 1) or any(flag_per_axis("causal", self.causal))
        # The search is over shapes: a sequence along one axis has none, and would take minutes.
        if given or special or sum(length > 1 for length in grid.shape) < 2:
            return None
        return _suited(*grid.shape, self.density)

    def predicate(self, grid: TokenGrid) -> NeighborhoodPredicate:
        """Which token of `grid` sees which.

        Raises:
            ValueError: as in `check`.
        """
        dilation, causal = per_axis("dilation", self.dilation), flag_per_axis("causal", self.causal)
        return neighborhood_predicate(grid, self.window_for(grid), self.stride_for(grid), dilation, causal)

    def tile_for(self, grid: TokenGrid) -> Axes:
        """The tile in use on `grid`: the one given, the one chosen with the window, or the fastest by the cost model.

        Raises:
            ValueError: as in `check`.
        """
        if self.tile is not None:
            return per_axis("tile", self.tile)
        chosen = self._chosen(grid)
        return _best_tile(self.predicate(grid), self.exact) if chosen is None else chosen.counts.tile

    def check(self, grid: TokenGrid) -> None:
        """Whether the parameters fit `grid`.

        Raises:
            ValueError: `window * dilation` larger than the grid along an axis, or a stride larger than the window.
        """
        self.predicate(grid)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by tiles."""
        return tiles_once(grid, self.tile_for(grid), device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan that depends on the grid of `site` alone.

        Args:
            q, k, v: `[B, H, N, D]`; only the device of `q` matters.
            site: where in the run the call is.
            previous: not used.

        Raises:
            ValueError: as in `check`.
        """
        predicate, order = self.predicate(site.grid), self.shared_order(site.grid, q.device)
        pairs = tile_pairs(predicate, self.tile_for(site.grid), order)
        kept, sizes = pairs > 0, order.block_sizes.double()
        partial = kept & (pairs < sizes[..., :, None] * sizes[..., None, :])
        if not self.exact or not partial.any():
            return AttentionPlan.from_kept(order, kept)
        kept_pairs = pairs.sum((-1, -2))
        return AttentionPlan.from_kept(order, kept, partial=partial, predicate=predicate, kept_pairs=kept_pairs)


_best_tile = lru_cache(maxsize=64)(best_tile)


@lru_cache(maxsize=64)
def _suited(frames: int, height: int, width: int, density: float) -> Setting | None:
    """The first suggested setting that meets `density` within 10% and whose window is nowhere below the least."""
    grid = TokenGrid(frames, height, width)
    least = [min(n, at_least) for n, at_least in zip(grid.shape, _LEAST_WINDOW, strict=True)]
    for found in suggest_settings(grid, density, count=32):
        near = abs(log(found.counts.density / density)) <= _TOLERANCE
        if near and all(n >= at_least for n, at_least in zip(found.window, least, strict=True)):
            return found
    return None


def _equal_shares(shape: Axes, least: list[int], most: list[int], density: float) -> list[float]:
    """One share of each axis, with product `density`: equal ones, save where a bound fixes an axis."""
    fixed: dict[int, float] = {axis: most[axis] / shape[axis] for axis in range(3) if least[axis] == most[axis]}
    while len(fixed) < 3:
        share = min(1.0, (density / prod(fixed.values())) ** (1 / (3 - len(fixed))))
        bounds = {a: (least[a] / shape[a], most[a] / shape[a]) for a in range(3) if a not in fixed}
        outside = {a: low if share < low else high for a, (low, high) in bounds.items() if not low <= share <= high}
        if not outside:
            return [fixed.get(axis, share) for axis in range(3)]
        fixed.update(outside)
    return [fixed[axis] for axis in range(3)]
