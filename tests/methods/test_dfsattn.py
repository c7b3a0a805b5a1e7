"""DFSAttn against loops over tiles."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse import DfsAttention, Schedule, Site, TokenGrid
from dit_sparse.reorder import curve_order
from tests.methods.literal import GRIDS, Block, best_per_row, random_qkv


def curve_blocks(grid: TokenGrid, size: int) -> list[Block]:
    """Runs of the curve; text in blocks of its own."""
    order = curve_order(grid, size)
    tokens, bounds = order.index[0, 0].tolist(), order.offsets[0, 0].tolist()
    text = range(grid.text_start, grid.text_start + grid.text_len)
    found = [tokens[a:b] for a, b in pairwise(bounds)]
    return [Block(block, block[0] in text) for block in found]


def block_scores(q: Tensor, k: Tensor, blocks: list[Block], size: int) -> list[list[float]]:
    """Sums of the softmax over tiles, a query tile by its tokens."""
    tiles = [[block.tokens[i : i + size] for i in range(0, len(block.tokens), size)] for block in blocks]
    keys = [(j, tile) for j, parts in enumerate(tiles) for tile in parts]
    found = [[0.0] * len(blocks) for _ in blocks]
    for i, parts in enumerate(tiles):
        for tile in parts:
            weights = [
                len(other) * math.exp(float(q[tile].mean(0) @ k[other].mean(0)) / q.shape[-1] ** 0.5)
                for _, other in keys
            ]
            for (j, _), weight in zip(keys, weights, strict=True):
                found[i][j] += weight / sum(weights) * len(tile)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("block", "tokens"), [(8, 3), (5, 8)])
def test_equals_the_literal_mask(grid: TokenGrid, block: int, tokens: int) -> None:
    q, k, v = random_qkv(grid)
    mask = DfsAttention(0.4, block, tokens).plan(q, k, v, Site(grid), None).token_mask()
    blocks = curve_blocks(grid, block)
    for b in range(2):
        for h in range(3):
            scores = block_scores(q[b, h].double(), k[b, h].double(), blocks, tokens)
            want = best_per_row(lambda i, j, s=scores: s[i][j], blocks, blocks, grid.num_tokens, 0.4)
            assert torch.equal(mask[b, h], want)


def test_the_papers_steps_and_falling_density() -> None:
    schedule = Schedule(DfsAttention(), warmup=0.24, ramp=(0.3, 0.2, 0.1))
    assert sorted(schedule.refresh_steps(50)) == [12, 24, 36]
    assert [schedule.method_at(step, 50).density for step in (12, 24, 25, 38)] == [0.3, 0.3, 0.2, 0.1]


def test_tokens_may_stand_in_the_shared_order_already() -> None:
    grid = TokenGrid(3, 5, 7, 4)
    q, k, v = random_qkv(grid)
    method = DfsAttention(0.4, 8, 4)
    order = method.shared_order(grid, q.device)
    want = method.plan(q, k, v, Site(grid), None)
    got = method.plan(order.permute(q), order.permute(k), v, Site(grid, in_order=True), None)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"block": 0}, "block"), ({"tokens": 0}, "tokens")]
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DfsAttention(**options)  # type: ignore[arg-type]
