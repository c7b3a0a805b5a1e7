"""Sliding tile attention: windows that slide by whole tiles, of a shape of its own for every head.

Source: Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.masks import mask_rows, masked_errors, probe_rows, tile_window, tile_window_density
from dit_sparse.masks.neighborhood import per_axis
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_count, check_share
from dit_sparse.reorder import tiles_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder

Axes = tuple[int, int, int]


@dataclass(frozen=True)
class SlidingTile(AnyGrid):
    """Every tile of queries sees the tiles of a window around its own, all of them whole.

    The window is counted in tiles and moved inwards at the borders, so that it never shrinks. Text sees everything and
    is seen by everything. With a `window`, all heads have it. Without one, each head takes, of up to `candidates`
    windows of about `density`, long in time or wide in space, the one under which the output of `rows` queries differs
    least from dense attention, once a run (the search of a window for each head).

    A window is whole tiles, so the density is met as nearly as the grid allows; what was met is in the statistics.

    Differs from the paper: the tile is 2x8x8 by default instead of 6x8x8, border tiles are smaller instead of being
    ruled out, and the search of windows runs in the run itself, on a few queries, among windows of equal density;
    there it is made offline, on whole outputs, among windows of unlike density.

    Raises:
        ValueError: a density outside (0, 1], or a size or number below 1.
    """

    window: int | tuple[int, int, int] | None = field(
        default=None,
        metadata={"help": "tiles that a tile sees along frames, height, width; none: each head's best of density"},
    )
    density: float = field(
        default=0.25, metadata={"help": "share of query-key pairs computed; ignored where window is given"}
    )
    tile: int | tuple[int, int, int] = field(
        default=(2, 8, 8), metadata={"help": "tokens of a tile along frames, height, width; one tile is one block"}
    )
    candidates: int = field(default=6, metadata={"help": "windows that a head can take"})
    rows: int = field(default=64, metadata={"help": "queries whose error decides which window a head takes"})

    name: ClassVar[str] = "sta"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "Sliding Tile Attention (arXiv 2502.04507)"
    described: ClassVar[Description] = Description(
        order="3-D tiles, one tile a block",
        score="none; windows by the error of 64 queries",
        selection="a window of whole tiles around every tile, per head, text kept",
        cached="masks of the windows",
        differs="smaller tiles, also at borders; windows of equal density, found in the run instead of offline",
    )
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        for name in ("window", "tile"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, per_axis(name, getattr(self, name)))
        check_share("density", self.density)
        check_count("candidates", self.candidates)
        check_count("rows", self.rows)

    @property
    def scope(self) -> Scope:
        """One plan for all where the window is given; else each head's window depends on the data."""
        return "call" if self.window is None else "grid"

    @property
    def overridden(self) -> dict[str, str]:
        """A window that is given wins over a density."""
        return {} if self.window is None else {"density": "window"}

    def windows_for(self, grid: TokenGrid) -> tuple[Axes, ...]:
        """The window given, cut to the grid, or the candidates of `density`."""
        tiles = tuple(-(-n // t) for n, t in zip(grid.shape, per_axis("tile", self.tile), strict=True))
        if self.window is not None:
            f, h, w = (min(n, size) for n, size in zip(tiles, per_axis("window", self.window), strict=True))
            return ((f, h, w),)
        every = [(f, h, w) for f, h, w in product(*(range(1, n + 1) for n in tiles))]
        found = {
            window: abs(tile_window_density(window, per_axis("tile", self.tile), grid) / self.density - 1)
            for window in every
        }
        nearest = min(found.values())
        near = sorted(window for window, gap in found.items() if gap <= max(0.05, nearest))
        count = min(self.candidates, len(near))
        return tuple(near[i * (len(near) - 1) // max(1, count - 1)] for i in range(count))

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by tiles."""
        return tiles_once(grid, per_axis("tile", self.tile), device)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k, v` `[B, H, N, D]`, which stand in the order by tiles where `site.in_order` is set."""
        order = self.shared_order(site.grid, q.device)
        fixed = _fixed(self, site.grid, q.device)
        if fixed.kept.shape[0] == 1:
            return AttentionPlan.from_kept(order, fixed.kept[None])
        if not site.in_order:
            q, k, v = (order.permute(x) for x in (q, k, v))
        choice = masked_errors(q, k, v, fixed.rows, fixed.masks).argmin(0)
        return AttentionPlan(order, order, BlockMask.from_bool(fixed.kept[choice], order.offsets, order.offsets))


class _Fixed(NamedTuple):
    """What depends on the grid alone: each window's mask of blocks, positions of the probed queries, their masks."""

    kept: Tensor
    rows: Tensor
    masks: Tensor


@lru_cache(maxsize=16)
def _fixed(method: SlidingTile, grid: TokenGrid, device: torch.device) -> _Fixed:
    # Tensors made in inference mode could not be used where gradients are recorded.
    with torch.inference_mode(False):
        order = method.shared_order(grid, torch.device("cpu"))
        tile = per_axis("tile", method.tile)
        kept = torch.stack([tile_window(window, tile, grid, order.num_blocks) for window in method.windows_for(grid)])
        rows = order.inverse[0, 0, probe_rows(grid, method.rows, torch.device("cpu"))]
        places = torch.arange(grid.num_tokens)[None, None]
        masks = torch.stack([mask_rows(blocks, order.with_tokens(places, places), rows) for blocks in kept])
        return _Fixed(kept.to(device), rows.to(device), masks.to(device))
