"""PAROAttention: per head the axis order that gathers attention into blocks, then a static block mask.

Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
Generation Models", arXiv 2506.16054.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import block_mass, dense_attention
from dit_sparse.masks import keep_text
from dit_sparse.methods.parameters import check_block, check_share
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import AXIS_ORDERS, axis_order, axis_orders_per_head
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class Paro:
    """Six axis orders are tried per head, the best is kept, and its heaviest blocks become a static mask (section 4).

    With a `plan_file`, orders and masks are those of an earlier calibration. Without one, the first sparse step
    calibrates on the run itself, and orders and masks then stay for the rest of it.

    Differs from the paper: calibration may be online and then belongs to one prompt; one mask serves all steps; the
    metrics are taken on `sample_blocks` query blocks a head; as printed the paper minimises both metrics, here the
    sparse one is 1 - M_sparse; `alpha` is not reported there, and is 1 here because nothing is quantised.

    Raises:
        ValueError: a share outside its range, a block or a sample below 1.
    """

    density: float = field(default=0.5, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block"})
    plan_file: str | None = field(default=None, metadata={"help": "a saved calibration; its density and block win"})
    sigma: float = field(default=0.9, metadata={"help": "a block is sparse when this share of its entries is small"})
    epsilon: float = field(default=1e-3, metadata={"help": "an attention weight below this is small"})
    alpha: float = field(default=1.0, metadata={"help": "weight of sparsity against quantisation incoherence"})
    sample_blocks: int = field(default=16, metadata={"help": "query blocks a head on which the orders are compared"})

    name: ClassVar[str] = "paro"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "PAROAttention (arXiv 2506.16054), section 4"
    scope: ClassVar[Scope] = "call"
    refresh: ClassVar[tuple[float, ...]] = ()

    @property
    def uses_lse(self) -> bool:
        """A plan file needs no search, so no dense step is spent on one."""
        return self.plan_file is None

    def __post_init__(self) -> None:
        for name in ("density", "sigma", "epsilon"):
            check_share(name, getattr(self, name))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha!r}")
        check_block("block", self.block)
        if self.sample_blocks < 1:
            raise ValueError(f"sample_blocks must be at least 1, got {self.sample_blocks!r}")

    def check(self, grid: TokenGrid) -> None:
        """Whether the plan file, if any, can be read and is for `grid`."""
        if self.plan_file is not None:
            PlanFile.open(self.plan_file).check(grid)

    def shared_order(self, grid: TokenGrid, device: torch.device) -> None:
        """None: every head has its own."""

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the plan file, or from a calibration on `q, k` `[B, H, N, D]`."""
        if self.plan_file is not None:
            return PlanFile.open(self.plan_file).plan(site.grid, site.layer, q.shape[1], q.device)
        lse = None if previous is None else previous.lse
        if lse is None:
            lse = dense_attention(q, k, v, return_lse=True)[1]
        axes = self._best_axes(q, k, lse, site.grid)
        order = axis_orders_per_head(site.grid, axes, self.block, device=q.device)
        mass = block_mass(
            order.permute(q),
            order.permute(k),
            order.permute(lse),
            order.offsets,
            order.offsets,
            scale=q.shape[-1] ** -0.5,
        )
        return AttentionPlan.from_kept(
            order, heaviest_blocks(mass.sum(0, keepdim=True), self.density, order, site.grid)
        )

    def _best_axes(self, q: Tensor, k: Tensor, lse: Tensor, grid: TokenGrid) -> list[str]:
        """The name of the best order of each head."""
        cost = []
        for axes in AXIS_ORDERS:
            order = axis_order(grid, axes, self.block, device=q.device)
            cost.append(self._metrics(order.permute(q), order.permute(k), order.permute(lse), grid))
        incoherence, dispersion = torch.stack(cost).unbind(-1)
        weighed = self.alpha * _share(dispersion) + (1 - self.alpha) * _share(incoherence)
        return [AXIS_ORDERS[best] for best in weighed.argmin(0).tolist()]

    def _metrics(self, q: Tensor, k: Tensor, lse: Tensor, grid: TokenGrid) -> Tensor:
        """`[H, 2]` float64: M_quant and 1 - M_sparse of the attention map under one order (section 4.1).

        Whole video blocks only: text and the ragged last block stay out.
        """
        block, start = self.block, grid.video_start
        blocks = max(1, grid.video_len // block)
        size = min(block, grid.video_len)
        k = k[:, :, start : start + blocks * size]
        rows = torch.linspace(0, blocks - 1, min(self.sample_blocks, blocks), device=q.device).round().long().unique()
        sums = torch.zeros(q.shape[1], 2, dtype=torch.float64, device=q.device)
        for row in rows.tolist():
            tokens = slice(start + row * size, start + (row + 1) * size)
            scores = (q[:, :, tokens].float() * q.shape[-1] ** -0.5) @ k.float().transpose(-1, -2)
            weights = (scores - lse[:, :, tokens, None]).exp_().unflatten(-1, (blocks, size))
            small = (weights < self.epsilon).float().mean((2, 4)) >= self.sigma
            peak = weights.amax((2, 4)) / weights.mean((2, 4)).clamp_min(1e-12)
            sums += torch.stack([peak.mean((0, 2)), 1 - small.float().mean((0, 2))], -1).double()
        return sums / len(rows)


def _share(cost: Tensor) -> Tensor:
    """`cost` `[6, H]` of each order as a share of the six orders' sum, so that unlike metrics can be added."""
    return cost / cost.sum(0).clamp_min(1e-12)


def heaviest_blocks(mass: Tensor, density: float, order: TokenOrder, grid: TokenGrid) -> Tensor:
    """The blocks of largest mass per head, whatever their row, up to `density` of all pairs (section 4.2).

    Every row keeps at least its heaviest block, and text blocks are always kept.

    Args:
        mass: `[1, H, Mq, Mk]` block masses in `order`.

    Returns:
        `[1, H, Mq, Mk]` bool.
    """
    row_best = torch.zeros_like(mass, dtype=torch.bool).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    forced = keep_text(row_best, grid, order.offsets, order.offsets)
    sizes = order.block_sizes.double()
    area = (sizes[..., :, None] * sizes[..., None, :]).expand_as(mass)
    budget = density * grid.num_tokens**2 - (area * forced).sum((-1, -2))
    ranked = mass.masked_fill(forced, -1).flatten(2).argsort(dim=-1, descending=True, stable=True)
    spent = (area * ~forced).flatten(2).gather(-1, ranked).cumsum(-1)
    within = spent <= budget[..., None]
    chosen = torch.zeros_like(within).scatter_(-1, ranked, within).view_as(forced)
    return chosen | forced
