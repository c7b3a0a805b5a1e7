"""Least-error attention: the blocks that their means would stand in for worst, more of them in early steps.

Our own composition; what it takes from others is named in its parts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor

from dit_sparse.kernels import Probes, attend_rows, output_errors
from dit_sparse.masks import best_blocks, blocks_within
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_count, check_share, check_tile, freeze_lists
from dit_sparse.reorder import merged_once, tiles_once
from dit_sparse.types import AttentionPlan, BlockMask, Previous, Remainder, Scope, Site, TokenGrid, TokenOrder

Orders: TypeAlias = tuple[TokenOrder, TokenOrder]
"""Of queries and of keys."""


class Found(NamedTuple):
    """What a search tells of a layer, all its heads together.

    Args:
        errors: `[B, H, Mq, Mk]`, added up over the guidance branches of a sample.
        output: `[B]` squared norm of the output; `None` where no error was asked for.
        branches: how many came in one batch.
    """

    errors: Tensor
    output: Tensor | None
    branches: int


_EARLY_SHARE = 0.2
_LARGEST_DENSITY = 0.95


@dataclass(frozen=True)
class LeastError(AnyGrid):
    """The blocks whose error would be largest if their mean stood in for them, of all heads of a layer together.

    What is not kept leaves the remainder "value". Keys are in blocks of one tile, queries in blocks of `query_tiles`. A
    search attends with `rows` queries of every query block, densely, and tells for every key block by how much the
    output would move if its mean stood in for it. One threshold on that error a query-key
    pair serves all rows and heads of a layer, so that rows and heads that need more blocks get them. Guidance branches
    share the plan of the first, which saves every other search.

    Early steps decide what the video shows, so the first fifth of the steps, which is the default warm-up of other
    methods, has `early` times the density of the rest, and no step need be dense: `Schedule(LeastError(), warmup=0)`.
    `density` is the mean over all steps of a run without warm-up.

    With an `error` the density comes out of the data instead: a plan keeps the fewest blocks such that the root of the
    squared errors of the others, by the search, is at most `error` of the norm of the output, over all heads of the
    layer. Errors of blocks are summed as if they were independent, and the means as if nothing else stood in for a
    block, so the error that is left is another; `dit_sparse.calibrate.for_error` measures it and finds the `error` of
    each layer for a wanted one. The first fifth of the steps has `error / sqrt(early)`.

    Differs from the paper: SVG-EAR bounds the error from the mean query of a cluster, where this measures it on real
    queries; chosen row by row there. SVG-EAR clusters tokens, this cuts the video into fixed tiles.

    Raises:
        ValueError: a density or an error outside (0, 1], a side of the tile, `query_tiles` or `rows` below 1, or
            `early` below 1.
    """

    density: float = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included, as a mean over the steps"}
    )
    tile: tuple[int, int, int] = field(
        default=(2, 8, 4), metadata={"help": "tokens of a tile; one tile is a key block"}
    )
    query_tiles: int = field(default=2, metadata={"help": "neighbouring tiles to a query block"})
    rows: int = field(default=16, metadata={"help": "queries of every query block that a search attends with"})
    early: float = field(
        default=4.0, metadata={"help": "density of the first fifth of the steps over that of the others"}
    )
    error: float | None = field(
        default=None, metadata={"help": "error that what is not kept may leave, over the output; it wins over density"}
    )

    name: ClassVar[str] = "lea"
    version: ClassVar[int] = 2
    paper: ClassVar[str] = "ours; choice by error as in SVG-EAR (arXiv 2603.08982)"
    described: ClassVar[Description] = Description(
        order="3-D tiles, one a key block, two a query block",
        score="error of the output if the block's mean stood in for it, on 16 queries of every query block",
        selection="the largest of all heads of a layer, whatever their row, text kept; more in early steps",
        cached="the plan of both guidance branches",
        differs="real queries instead of means, one threshold a layer, fixed tiles instead of clusters",
    )
    scope: ClassVar[Scope] = "sample"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.05, 0.1, 0.2, 0.4, 0.7)
    own_remainder: ClassVar[Remainder] = "value"
    control: ClassVar[str] = "error"

    def __post_init__(self) -> None:
        freeze_lists(self)
        check_share("density", self.density)
        check_tile(self.tile)
        check_count("query_tiles", self.query_tiles)
        check_count("rows", self.rows)
        if isinstance(self.early, bool) or not isinstance(self.early, (int, float)) or not 1 <= self.early < 1e6:
            raise ValueError(f"early must be at least 1 and below a million, got {self.early!r}: 4 is the default")
        if self.error is not None:
            check_share("error", self.error)

    @property
    def key_block(self) -> int:
        """Tokens a key block."""
        return math.prod(self.tile)

    @property
    def query_block(self) -> int:
        """Tokens a query block."""
        return self.key_block * self.query_tiles

    @property
    def overridden(self) -> dict[str, str]:
        """An error that is given wins over a density."""
        return {} if self.error is None else {"density": "error"}

    def shared_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The order by tiles, in even blocks."""
        return tiles_once(grid, self.tile, device, True)

    def query_order(self, grid: TokenGrid, device: torch.device) -> TokenOrder:
        """The same order in blocks of `query_tiles` tiles."""
        return merged_once(self.shared_order(grid, device), grid, self.query_tiles)

    def _orders(self, grid: TokenGrid, device: torch.device) -> Orders:
        return self.query_order(grid, device), self.shared_order(grid, device)

    def step_densities(self, num_steps: int) -> list[float]:
        """Density of each step of a run: `early` times as large in the first fifth, below that of a dense step."""
        first = _early_steps(num_steps)
        others = num_steps - first
        low = self.density * num_steps / (self.early * first + others)
        high = min(self.early * low, max(_LARGEST_DENSITY, self.density))
        low = (self.density * num_steps - high * first) / others
        return [high] * first + [low] * others

    def density_at(self, site: Site) -> float:
        """Density of the call at `site`."""
        return self.step_densities(site.num_steps)[min(site.step, site.num_steps - 1)]

    def at_density(self, density: float) -> LeastError:
        """The same with `density` at every step."""
        return replace(self, density=density, early=1)

    def threshold_at(self, site: Site) -> float | None:
        """Error that the plan of the call at `site` may leave."""
        is_early = site.step < _early_steps(site.num_steps)
        return self.error if self.error is None or not is_early else self.error / math.sqrt(self.early)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from one search over `q, k, v` `[B, H, N, D]`, in the order by tiles where `site.in_order` is set."""
        if self.error is None and self.density_at(site) >= 1:
            q_order, kv_order = self._orders(site.grid, q.device)
            return AttentionPlan(q_order, kv_order, BlockMask.full(q_order.offsets, kv_order.offsets))
        return self.plan_from(self.search(q, k, v, site), site)

    def search(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Found:
        """What plans with any density or, where this has one, any `error` are made from; arguments as in `plan`."""
        orders = q_order, kv_order = self._orders(site.grid, q.device)
        if not site.in_order:
            q, k, v = (kv_order.permute(x) for x in (q, k, v))
        probes = None if self.error is None else attend_rows(q, k, v, q_order, self.rows)
        errors = self.errors(q, k, v, orders, probes)
        # The branches of a sample have one plan also where they come in one batch.
        errors = errors.unflatten(0, (site.branches, -1)).sum(0)
        errors = errors if site.heads is None else site.heads.gather(errors)
        if probes is None:
            return Found(errors, None, site.branches)
        output = probes.squares(q_order).unflatten(0, (site.branches, -1)).sum((0, 2, 3))
        return Found(errors, output if site.heads is None else site.heads.sum(output), site.branches)

    def plan_from(self, found: Found, site: Site) -> AttentionPlan:
        """The plan of the call at `site` from what `search` found there."""
        orders = q_order, kv_order = self._orders(site.grid, found.errors.device)
        if (error := self.threshold_at(site)) is None or found.output is None:
            kept = self.choose(found.errors, self.density_at(site), orders, site.grid)
        else:
            most = error**2 * found.output
            kept = blocks_within(found.errors, most, q_order.offsets, kv_order.offsets, site.grid)
        kept = (kept if site.heads is None else site.heads.own(kept)).repeat(found.branches, 1, 1, 1)
        return AttentionPlan.from_kept(q_order, kept, kv_order=kv_order, remainder=self.own_remainder)

    def errors(self, q: Tensor, k: Tensor, v: Tensor, orders: Orders, probes: Probes | None) -> Tensor:
        """`[B, H, Mq, Mk]` float32: what leaving each block to its mean costs, of tokens in the orders' positions."""
        return output_errors(q, k, v, *orders, rows=self.rows, probes=probes)

    def choose(self, errors: Tensor, density: float, orders: Orders, grid: TokenGrid) -> Tensor:
        """`[B, H, Mq, Mk]` bool: the blocks that are kept at `density`, all heads together."""
        return best_blocks(errors, density, orders[0].offsets, orders[1].offsets, grid)


def _early_steps(num_steps: int) -> int:
    # As a schedule rounds the refresh at this share, or a plan of early steps would outlast them.
    return min(num_steps - 1, max(1, round(_EARLY_SHARE * num_steps)))
