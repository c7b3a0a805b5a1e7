"""What the methods' tests share: inputs, and blocks of tokens listed one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_sparse import TokenGrid
from dit_sparse.types import AttentionPlan

GRIDS = [
    TokenGrid(3, 4, 5),
    TokenGrid(3, 4, 6, text_len=5, text_first=True),
    TokenGrid(2, 5, 5, text_len=3),
    TokenGrid(1, 6, 7, text_len=4),
]

DEMO = TokenGrid(8, 24, 32)
"""The demo model's layout."""


def inputs(grid: TokenGrid, batch: int = 2, heads: int = 2, dim: int = 8, scale: float = 2.0) -> list[Tensor]:
    """Random `q, k, v` `[B, H, N, D]`, always the same."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, grid.num_tokens, dim, generator=generator)
    return [scale * q, scale * k, v]


def smooth_inputs(grid: TokenGrid, batch: int = 1, heads: int = 2, dim: int = 16) -> list[Tensor]:
    """Inputs that change slowly over the video, as a model's do."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3 * batch * heads, dim, 3, 4, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, grid.shape, mode="trilinear").flatten(2).transpose(1, 2)
    fine = fine.reshape(3, batch, heads, grid.video_len, dim)
    text = torch.randn(3, batch, heads, grid.text_len, dim, generator=generator)
    q, k, v = torch.cat([text, fine] if grid.text_first else [fine, text], dim=-2)
    return [3 * q, 3 * k, v]


def cut(tokens: Sequence[int], size: int) -> list[list[int]]:
    """Runs of `size` tokens, the last one shorter."""
    return [list(tokens[first : first + size]) for first in range(0, len(tokens), size)]


def blocks_of(grid: TokenGrid, video: Sequence[Sequence[int]], size: int) -> list[tuple[list[int], bool]]:
    """The blocks of a sequence, each with whether it is text.

    Args:
        grid: the layout.
        video: the video's blocks, of raster numbers.
        size: tokens of a text block.
    """
    parts = [([token + grid.video_start for token in block], False) for block in video]
    text = [(block, True) for block in cut(range(grid.text_start, grid.text_start + grid.text_len), size)]
    return text + parts if grid.text_first else parts + text


def coordinates(grid: TokenGrid, token: int) -> tuple[int, int, int]:
    """Frame, row and column of a video token of the sequence."""
    place = token - grid.video_start
    return place // (grid.height * grid.width), place // grid.width % grid.height, place % grid.width


def tokens_of(
    q_blocks: list[tuple[list[int], bool]], k_blocks: list[tuple[list[int], bool]], kept: list[list[bool]]
) -> Tensor:
    """`[N, N]` bool: block by block, text always kept."""
    total = sum(len(block) for block, _ in q_blocks)
    mask = torch.zeros(total, total, dtype=torch.bool)
    for i, (queries, q_text) in enumerate(q_blocks):
        for j, (keys, k_text) in enumerate(k_blocks):
            if kept[i][j] or q_text or k_text:
                for token in queries:
                    mask[token, keys] = True
    return mask


def check_text_and_rows(plan: AttentionPlan, grid: TokenGrid) -> None:
    """Text sees all and is seen by all, and no query is without keys."""
    mask = plan.token_mask()
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    assert mask[..., text, :].all()
    assert mask[..., text].all()
    assert mask.any(-1).all()
