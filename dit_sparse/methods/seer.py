"""SeerAttention: a small trained gate scores the blocks.

Source: Gao et al., "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dit_sparse.kernels import pooled_blocks
from dit_sparse.masks import block_extremes, keep_text, select_density, threshold
from dit_sparse.methods.any_grid import AnyGrid
from dit_sparse.methods.description import Description
from dit_sparse.methods.gate_file import Gate, GateFile
from dit_sparse.methods.parameters import check_share
from dit_sparse.reorder import raster_once
from dit_sparse.types import AttentionPlan, Previous, Scope, Site, TokenGrid, TokenOrder


@dataclass(frozen=True)
class SeerAttention(AnyGrid):
    """A gate a layer projects pooled queries and keys, and the softmax of their products scores blocks.

    Queries are pooled by their mean, keys by mean, maximum and minimum; each head has projections of its own. The gate
    is trained to give the largest attention weight of each block (`scripts/train_gate.py`), and read from `weights`.

    Differs from the paper: not causal; queries and keys come with their rotary embedding already, so the gate adds none
    of its own; equally many blocks a row by `density`, or all that score at least `threshold` with `density=None`; text
    is kept.

    Raises:
        ValueError: a share outside (0, 1].
    """

    weights: str | None = field(default=None, metadata={"help": "file of gates that scripts/train_gate.py wrote"})
    density: float | None = field(
        default=0.25, metadata={"help": "share of query-key pairs computed, text included; none: by threshold"}
    )
    threshold: float = field(default=0.004, metadata={"help": "score from which a block is kept where density is none"})

    name: ClassVar[str] = "seer"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "SeerAttention (arXiv 2410.13276), AttnGate"
    described: ClassVar[Description] = Description(
        order="raster",
        score="a trained gate on mean q and on mean, largest and smallest k",
        selection="equally many a query block, or all above a threshold; text kept",
        cached="gates, from a weights file",
        differs="not causal; no rotary embedding in the gate; a density instead of the threshold",
    )
    control: ClassVar[str] = "threshold"
    scope: ClassVar[Scope] = "call"
    uses_lse: ClassVar[bool] = False
    refresh: ClassVar[tuple[float, ...]] = (0.4, 0.6, 0.8)

    def __post_init__(self) -> None:
        for name in ("threshold",) if self.density is None else ("threshold", "density"):
            check_share(name, getattr(self, name))

    def check(self, grid: TokenGrid) -> None:
        """Whether there are weights that can be read."""
        self.file()

    def file(self) -> GateFile:
        """The gates.

        Raises:
            ValueError: no weights are given, or they cannot be read.
        """
        if self.weights is None:
            raise ValueError("weights must be a file of gates, got none: scripts/train_gate.py trains one")
        return GateFile.open(self.weights)

    def plan(self, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None) -> AttentionPlan:
        """Plan for `q, k` `[B, H, N, D]` by the gate of the site's layer."""
        file = self.file()
        heads = q.shape[1] if site.heads is None else site.heads.total
        gate = file.gate(site.model, site.layer, heads, q.shape[-1], q.device)
        if site.heads is not None:
            gate = Gate(*(x[list(site.heads.heads)] for x in (gate.q, gate.k)))
        order = raster_once(site.grid, file.block, q.device)
        scores = gate_logits(*gate_inputs(q, k, order), gate).softmax(-1)
        if self.density is None:
            kept = keep_text(threshold(scores, self.threshold), site.grid, order.offsets, order.offsets)
        else:
            kept = select_density(scores, self.density, order, order, site.grid)
        return AttentionPlan.from_kept(order, kept)


def gate_inputs(q: Tensor, k: Tensor, order: TokenOrder) -> tuple[Tensor, Tensor]:
    """Pooled queries `[B, H, M, D]` and keys `[B, H, M, 3 D]` float32: mean, largest and smallest of each channel.

    Args:
        q, k: `[B, H, N, D]` in the order's positions.
        order: an order whose blocks all heads share.
    """
    least, most = block_extremes(k, order, order.geometry.largest)
    means = (pooled_blocks(x, order.offsets).float() for x in (q, k))
    return next(means), torch.cat([next(means), most.squeeze(3), least.squeeze(3)], -1)


def gate_logits(q: Tensor, k: Tensor, gate: Gate) -> Tensor:
    """Logits of the blocks, `[B, H, M, M]`, from pooled queries and keys as `gate_inputs` gives them."""
    size = gate.q.shape[-1]
    return (q @ gate.q.float()) @ (k @ gate.k.float()).transpose(-1, -2) * size**-0.5
