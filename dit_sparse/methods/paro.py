"""PAROAttention: per head the axis order that gathers attention into blocks, then a static block mask.

Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
Generation Models", arXiv 2506.16054.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor

from dit_sparse.kernels import block_mass, dense_attention
from dit_sparse.masks import best_orders, heaviest_blocks, metrics_by_order
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.parameters import check_block, check_share, check_tile, freeze_lists
from dit_sparse.methods.plan_ahead import reader_of
from dit_sparse.methods.plan_file import PlanFile
from dit_sparse.reorder import Block, axis_orders_per_head, block_tokens, distinct_axis_orders
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class Paro(AnyGrid):
    """Six axis orders are tried per head, the best is kept, and its heaviest blocks become a static mask (section 4).

    With a `plan_file`, orders and masks are those of an earlier calibration (`dit_sparse.calibrate`), with a mask for
    each of the first steps. Without one, the first sparse step calibrates on the run itself, and orders and masks then
    stay for the rest of it.

    Differs from the paper: calibration may be online, and then belongs to one prompt and serves all steps; the metrics
    are taken on `sample_blocks` query blocks a head; as printed the paper minimises both metrics, here the sparse one
    is 1 - M_sparse; `alpha` is not reported there, and is 1 here because nothing is quantised; `sigma` and `epsilon`
    are 0.9 and 1e-3 there, which chose worse orders than raster where that was measured (docs/methods/paro.md). Blocks
    are runs of the order there; with a `tile` they are 3-D tiles whose sides follow it, for a remainder's sake.

    Raises:
        ValueError: a share outside its range, a block or a sample below 1.
    """

    density: float = field(default=0.5, metadata={"help": "share of query-key pairs computed, text included"})
    block: int = field(default=64, metadata={"help": "tokens a block, where no tile is given"})
    plan_file: str | None = field(
        default=None, metadata={"help": "a saved calibration; all other parameters are its own"}
    )
    sigma: float = field(default=0.99, metadata={"help": "a block is sparse when this share of its entries is small"})
    epsilon: float | None = field(
        default=None, metadata={"help": "an attention weight below this is small; none: below the mean weight"}
    )
    alpha: float = field(default=1.0, metadata={"help": "weight of sparsity against quantisation incoherence"})
    sample_blocks: int = field(default=16, metadata={"help": "query blocks a head on which the orders are compared"})
    tile: tuple[int, int, int] | None = field(
        default=None,
        metadata={"help": "blocks are tiles with these sides along a head's slowest, middle, fastest axis; none: runs"},
    )

    name: ClassVar[str] = "paro"
    version: ClassVar[int] = 1
    head_orders: ClassVar[int] = 1
    paper: ClassVar[str] = "PAROAttention (arXiv 2506.16054), section 4"
    described: ClassVar[Description] = Description(
        order="per head the best of the six axis orders, in runs or in tiles",
        score="exact attention mass",
        selection="the heaviest of a head, whatever their row, text kept",
        cached="row LSE; orders and masks, in a plan file",
        differs="without a plan file it calibrates in the run; other thresholds; nothing is quantised",
    )

    @property
    def scope(self) -> Scope:
        """A plan file's plans depend on the layer and the step alone, so both guidance branches share them."""
        return "call" if self.plan_file is None else "layer"

    @property
    def refresh(self) -> tuple[float, ...]:
        """A plan file's masks change at the shares of the run that it names."""
        return () if self.plan_file is None else PlanFile.open(self.plan_file).header.changes

    @property
    def overridden(self) -> dict[str, str]:
        """A plan file has been made with parameters of its own."""
        names = [f.name for f in fields(self) if f.name != "plan_file"]
        return {} if self.plan_file is None else dict.fromkeys(names, "plan_file")

    @property
    def uses_lse(self) -> bool:
        """A plan file needs no search, so no dense step is spent on one."""
        return self.plan_file is None

    def __post_init__(self) -> None:
        freeze_lists(self)
        for name in ("density", "sigma") if self.epsilon is None else ("density", "sigma", "epsilon"):
            check_share(name, getattr(self, name))
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, got {self.alpha!r}")
        check_block("block", self.block)
        check_tile(self.tile)
        if self.sample_blocks < 1:
            raise ValueError(f"sample_blocks must be at least 1, got {self.sample_blocks!r}")

    @property
    def cut(self) -> Block:
        """How the orders are cut: in tiles where one is given."""
        return self.tile or self.block

    @property
    def query_block(self) -> int:
        """Tokens a query block."""
        return block_tokens(self.cut)

    def check(self, grid: TokenGrid) -> None:
        """Whether the plan file, if any, can be read and is for `grid`."""
        if self.plan_file is not None:
            PlanFile.open(self.plan_file).check(grid)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan from the plan file, or from a calibration on `q, k` `[B, H, N, D]`."""
        if self.plan_file is not None:
            return _plan_from(PlanFile.open(self.plan_file), site, q)
        lse = None if previous is None else previous.lse
        if lse is None:
            lse = dense_attention(q, k, v, return_lse=True)[1]
        candidates = distinct_axis_orders(site.grid, self.cut)
        best = best_orders(self.metrics(q, k, lse, site.grid), self.alpha)
        axes = [candidates[number] for number in best.tolist()]
        order = axis_orders_per_head(site.grid, axes, self.cut, device=q.device)
        mass = mass_under(order, q, k, lse)
        return AttentionPlan.from_kept(order, heaviest_blocks(mass, self.density, order.offsets, site.grid))

    def metrics(self, q: Tensor, k: Tensor, lse: Tensor, grid: TokenGrid) -> Tensor:
        """M_sparse and M_quant of each head under each of `distinct_axis_orders`, `[H, O, 2]` float64."""
        return metrics_by_order(
            q,
            k,
            lse,
            grid,
            distinct_axis_orders(grid, self.cut),
            block=self.cut,
            sigma=self.sigma,
            epsilon=self.epsilon,
            sample_blocks=self.sample_blocks,
        )


def mass_under(order: TokenOrder, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Attention mass of each block under `order`, `[1, H, M, M]` float32, the mean over the batch.

    Args:
        q, k: `[B, H, N, D]` in the sequence's own order.
        lse: `[B, H, N]` row sums of the dense attention.
    """
    mass = block_mass(
        order.permute(q),
        order.permute(k),
        order.permute(lse),
        order.offsets,
        order.offsets,
        scale=q.shape[-1] ** -0.5,
        q_blocks=order.geometry,
        k_blocks=order.geometry,
    )
    return mass.mean(0, keepdim=True)


def _plan_from(file: PlanFile, site: Site, q: Tensor) -> AttentionPlan:
    """The file's plan for `site`.

    Raises:
        ValueError: it is for another grid or for a model of another shape, or it is damaged.
    """
    file.check(site.grid)
    plans = file.plans_of(site.model)
    heads = q.shape[1] if site.heads is None else site.heads.total
    if (plans.layers, plans.heads) != (site.num_layers, heads):
        raise ValueError(
            f"plan_file {str(file.path)!r} is for {plans.layers} layers of {plans.heads} heads, got {site.num_layers} "
            f"of {heads}; calibrate with this model"
        )
    plan = reader_of(file, q.device).plan(site.model, site.layer, plans.slot(site.step, site.num_steps), site.grid)
    return plan if site.heads is None else plan.of_heads(site.heads.heads)
