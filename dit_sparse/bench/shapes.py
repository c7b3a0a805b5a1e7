"""The shapes that are timed, their inputs, and the plans for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.types import AttentionPlan, TokenGrid, TokenOrder

# Larger than the L2 cache of any GPU so far; inputs rotate beyond twice this.
_CACHE_BYTES = 64 << 20


@dataclass(frozen=True)
class Shape:
    """One model's self-attention, batch 1."""

    heads: int
    dim: int
    tokens: int

    @property
    def flops(self) -> int:
        """Operations of dense attention."""
        return 4 * self.heads * self.tokens**2 * self.dim


def _shape(heads: int, dim: int, grid: TokenGrid) -> Shape:
    return Shape(heads, dim, grid.num_tokens)


SHAPES = {
    "wan-1.3b": _shape(12, 128, TokenGrid(21, 30, 52)),
    "wan-14b": _shape(40, 128, TokenGrid(21, 45, 80)),
    "hunyuan": _shape(24, 128, TokenGrid(33, 45, 80, text_len=256)),
    "cogvideox-5b": _shape(48, 64, TokenGrid(13, 30, 45, text_len=226)),
    "flux": _shape(24, 128, TokenGrid(1, 64, 64, text_len=512)),
    "flux-2k": _shape(24, 128, TokenGrid(1, 128, 128, text_len=512)),
}


def inputs(shape: Shape, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Copies of q, k, v `[1, H, N, D]` that are larger than twice the L2 cache together."""
    size = (1, shape.heads, shape.tokens, shape.dim)
    draw = [tuple(torch.randn(size, device=device, dtype=dtype) for _ in range(3))]
    nbytes = 3 * draw[0][0].numel() * dtype.itemsize
    while device.type == "cuda" and nbytes * len(draw) < 2 * _CACHE_BYTES:
        draw.append(tuple(x.clone() for x in draw[0]))
    return draw  # type: ignore[return-value]


def random_plan(shape: Shape, block: int, density: float, device: torch.device) -> AttentionPlan:
    """Plan with random blocks a head, equally many in every row: the worst case for caches."""
    offsets = torch.tensor([*range(0, shape.tokens, block), shape.tokens], device=device)
    order = TokenOrder.from_index(torch.arange(shape.tokens, device=device), offsets, is_identity=True)
    scores = torch.rand(1, shape.heads, order.num_blocks, order.num_blocks, device=device)
    top = scores.topk(max(1, round(density * order.num_blocks)), -1).indices
    return AttentionPlan.from_kept(order, torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top, True))
