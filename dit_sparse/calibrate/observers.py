"""What calibration takes from attention calls: metrics of the orders in its first pass, block masses in its second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dit_sparse.calibrate.store import MassStore
from dit_sparse.masks import best_orders, with_other_text
from dit_sparse.methods import Paro
from dit_sparse.methods.paro import mass_under
from dit_sparse.methods.plan_header import ModelPlans
from dit_sparse.reorder import Block, axis_orders_per_head, block_tokens, distinct_axis_orders
from dit_sparse.types import Site, TokenGrid, TokenOrder


class OrderSearch:
    """Means of the metrics of every layer, head and candidate order over all calls it is shown.

    Attributes:
        grid, num_steps: of the first call; the text of others may be of another length.
    """

    def __init__(self, method: Paro) -> None:
        self.method = method
        self.grid: TokenGrid | None = None
        self.num_steps = 0
        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        self.grid, self.num_steps = self.grid or site.grid, site.num_steps
        if self.grid.shape != site.grid.shape:
            raise ValueError(f"prompts must all give one token grid, got {self.grid} and {site.grid}; fix the size")
        layer = site.model, site.layer
        metrics = self.method.metrics(q, k, lse, site.grid)
        self._sums[layer] = metrics + self._sums.get(layer, 0)
        self._counts[layer] = self._counts.get(layer, 0) + 1

    def metrics(self) -> dict[str, list[Tensor]]:
        """For each transformer and layer `[H, O, 2]` float64, on the CPU."""
        means: dict[str, list[Tensor]] = {}
        for model, layer in sorted(self._sums):
            means.setdefault(model, []).append(self._sums[model, layer].cpu() / self._counts[model, layer])
        return means

    def axes(self) -> dict[str, list[tuple[str, ...]]]:
        """For each transformer and layer, the best order of each head."""
        assert self.grid is not None
        candidates = distinct_axis_orders(self.grid, self.method.cut)

        def names(metrics: Tensor) -> tuple[str, ...]:
            return tuple(candidates[number] for number in best_orders(metrics, self.method.alpha).tolist())

        return {model: [names(layer) for layer in layers] for model, layers in self.metrics().items()}


class MassSums:
    """Means of the block masses of every layer and slot over all calls it is shown.

    Args:
        store: where the sums wait.
        axes: for each transformer and layer, the order of each head.
        block: tokens a block, or the sides of a tile, as in `axis_order`.
        starts: shares of the run at which a new slot begins.
        grid: the layout that the sums are of; calls may have text of another length, whose mass does not matter.
    """

    def __init__(
        self,
        store: MassStore,
        axes: Mapping[str, Sequence[tuple[str, ...]]],
        block: Block,
        starts: tuple[float, ...],
        grid: TokenGrid,
    ) -> None:
        self._store = store
        self._axes = axes
        self._block = block
        self._slots = ModelPlans(1, 1, starts)
        self._grid = grid
        self._orders: dict[tuple[TokenGrid, tuple[str, ...]], TokenOrder] = {}

    def __call__(self, site: Site, q: Tensor, k: Tensor, lse: Tensor) -> None:
        slot = self._slots.slot(site.step, site.num_steps)
        order = self._order(self._axes[site.model][site.layer], site.grid, q.device)
        mass = mass_under(order, q, k, lse)
        if site.grid != self._grid:
            mass = with_other_text(mass, site.grid, self._grid, block_tokens(self._block), 0.0)
        self._store.add((site.model, site.layer, slot), mass)

    def _order(self, axes: tuple[str, ...], grid: TokenGrid, device: torch.device) -> TokenOrder:
        if (grid, axes) not in self._orders:
            self._orders[grid, axes] = axis_orders_per_head(grid, axes, self._block, device=device)
        return self._orders[grid, axes]
