"""What the literal masks of the methods' tests share: blocks as lists of tokens, best blocks a row, all in loops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse import TokenGrid

GRIDS = [
    TokenGrid(2, 4, 5),
    TokenGrid(2, 4, 4, text_len=5, text_first=True),
    TokenGrid(2, 4, 5, text_len=3),
    TokenGrid(1, 6, 7, text_len=8),
]


@dataclass(frozen=True)
class Block:
    """The tokens of one block, and whether they are text."""

    tokens: list[int]
    is_text: bool


def raster_blocks(grid: TokenGrid, block: int) -> list[Block]:
    """The sequence cut in blocks of `block` tokens, in its own order, text in blocks of its own."""
    parts = [(grid.video_start, grid.video_len, False), (grid.text_start, grid.text_len, True)]
    blocks = []
    for start, length, is_text in parts:
        tokens = list(range(start, start + length))
        blocks += [Block(tokens[i : i + block], is_text) for i in range(0, length, block)]
    return sorted(blocks, key=lambda b: b.tokens[0])


def fill(chosen: set[tuple[int, int]], q_blocks: list[Block], k_blocks: list[Block], tokens: int) -> Tensor:
    """`[N, N]` bool: the pairs of blocks in `chosen`, and every block of text as query and as key."""
    mask = torch.zeros(tokens, tokens, dtype=torch.bool)
    for i, query in enumerate(q_blocks):
        for j, key in enumerate(k_blocks):
            if (i, j) in chosen or query.is_text or key.is_text:
                for token in query.tokens:
                    mask[token, key.tokens] = True
    return mask


def best_per_row(
    score: Callable[[int, int], float], q_blocks: list[Block], k_blocks: list[Block], tokens: int, density: float
) -> Tensor:
    """`[N, N]` bool: equally many of the best video blocks a row, the number that comes nearest to `density`."""
    video = [j for j, key in enumerate(k_blocks) if not key.is_text]
    ranked = [sorted(video, key=lambda j, i=i: (-score(i, j), j)) for i in range(len(q_blocks))]
    masks = []
    for count in range(1, len(video) + 1):
        chosen = {(i, j) for i, row in enumerate(ranked) for j in row[:count]}
        masks.append(fill(chosen, q_blocks, k_blocks, tokens))
    gaps = [abs(float(mask.double().mean()) - density) for mask in masks]
    nearest = min(gaps)
    return next(mask for mask, gap in zip(masks, gaps, strict=True) if gap < nearest + 1e-12)


def random_qkv(grid: TokenGrid, batch: int = 2, heads: int = 3, dim: int = 16, seed: int = 0) -> tuple[Tensor, ...]:
    """`q, k, v` `[B, H, N, D]`, with logits spread enough that scores differ."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, grid.num_tokens, dim, generator=generator)
    return 2 * q, k, v


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """`[N, N]` float64 attention weights of one head's `q, k` `[N, D]`."""
    logits = torch.stack([torch.stack([(a * b).sum() for b in k.double()]) for a in q.double()])
    return (logits / q.shape[-1] ** 0.5).softmax(-1)
