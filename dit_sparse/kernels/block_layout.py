"""Blocks of tokens as one tensor, the shorter ones padded with zeros; a view where all blocks are even."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.types import BlockGeometry, TokenOrder

__all__ = ["BlockLayout"]


@dataclass(frozen=True)
class BlockLayout:
    """How tokens `[B, H, N, ...]` lie in blocks `[B, H, M, L, ...]`, where L is the largest block's size.

    Args:
        offsets: `[B|1, H|1, M+1]` int32 block bounds.
        blocks: their sizes.
        tokens: how many there are.
    """

    offsets: Tensor
    blocks: BlockGeometry
    tokens: int

    @classmethod
    def of_head(cls, order: TokenOrder, batch: int, head: int) -> BlockLayout:
        """The blocks of one batch and head of `order`."""
        b, h = (i % size for i, size in zip((batch, head), order.offsets.shape, strict=False))
        return cls(order.offsets[b : b + 1, h : h + 1], order.geometry, order.num_tokens)

    @property
    def is_even(self) -> bool:
        """Whether every block has the largest size."""
        return (self.offsets.shape[-1] - 1) * self.blocks.largest == self.tokens

    @property
    def sizes(self) -> Tensor:
        """`[B|1, H|1, M]` int32 tokens a block."""
        return self.offsets.diff(dim=-1)

    def split(self, x: Tensor) -> Tensor:
        """`x` `[B, H, N, D]` as `[B, H, M, L, D]`."""
        if self.is_even:
            return x.unflatten(2, (-1, self.blocks.largest))
        place = torch.arange(self.blocks.largest, device=x.device)
        positions = self.offsets[..., :-1, None] + place
        inside = place < self.sizes[..., None]
        index = positions.clamp(max=self.tokens - 1).long().flatten(2).expand(*x.shape[:2], -1)
        found = x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1])).unflatten(2, positions.shape[2:])
        return found.masked_fill(~inside[..., None], 0.0)

    def join(self, x: Tensor) -> Tensor:
        """`x` `[B, H, M, L, D]` back as `[B, H, N, D]`."""
        if self.is_even:
            return x.flatten(2, 3)
        positions = torch.arange(self.tokens, dtype=torch.int32, device=x.device)
        positions = positions.expand(*self.offsets.shape[:2], -1).contiguous()
        block = torch.searchsorted(self.offsets[..., 1:].contiguous(), positions, right=True)
        index = positions - self.offsets.gather(2, block) + block * self.blocks.largest
        index = index.expand(*x.shape[:2], -1)
        return x.flatten(2, 3).gather(2, index[..., None].expand(-1, -1, -1, x.shape[-1]))
