"""MInference against loops: lines of sampled queries' attention, sinks and neighbours, pooled products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import MInference, Site, TokenGrid
from dit_sparse.masks import probe_rows
from dit_sparse.methods.minference import PATTERNS
from tests.methods.literal import GRIDS, Block, best_per_row, random_qkv, raster_blocks, weights_of

BLOCK, ROWS = 8, 6


def literal_scores(pattern: str, q: Tensor, k: Tensor, blocks: list[Block], rows: list[int]) -> dict:
    """What each pair of blocks is worth under `pattern`, for one head."""
    size = len(blocks)
    block_of = {token: i for i, block in enumerate(blocks) for token in block.tokens}
    weights = weights_of(q, k)
    scores = {}
    first = next(i for i, block in enumerate(blocks) if not block.is_text)
    for i in range(size):
        for j in range(size):
            if pattern == "a-shape":
                scores[i, j] = 1000 if j == first else -abs(i - j)
            elif pattern == "block-sparse":
                means = q[blocks[i].tokens].double().mean(0) @ k[blocks[j].tokens].double().mean(0)
                scores[i, j] = float(torch.exp(means / q.shape[-1] ** 0.5)) * len(blocks[j].tokens)
            else:
                column = [float(weights[row, blocks[j].tokens].sum()) for row in rows]
                line = []
                for row in rows:
                    place = block_of[row] + j - i
                    if 0 <= place < size and not blocks[place].is_text:
                        line.append(float(weights[row, blocks[place].tokens].sum()))
                slash = sum(line) / len(line) if line else 0.0
                scores[i, j] = max(sum(column) / len(column), slash)
    return scores


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_literal_pattern(grid: TokenGrid, density: float, pattern: str) -> None:
    q, k, v = random_qkv(grid)
    plan = MInference(density, pattern, BLOCK, rows=ROWS).plan(q, k, v, Site(grid), None)
    mask = plan.token_mask().expand(2, 3, -1, -1)
    blocks, rows = raster_blocks(grid, BLOCK), probe_rows(grid, ROWS, q.device).tolist()
    for b in range(2):
        for h in range(3):
            scores = literal_scores(pattern, q[b, h], k[b, h], blocks, rows)
            want = best_per_row(lambda i, j, s=scores: s[i, j], blocks, blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_each_head_gets_the_pattern_that_keeps_most() -> None:
    """One head looks at one block wherever the query is, one a fixed distance ahead, and one at its own kind."""
    grid, block = TokenGrid(1, 16, 16), 16
    place = torch.arange(256) // block
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.one_hot(place, 16).float()
    q = torch.stack(
        [
            keys[11 * 16].expand(256, -1),
            keys.roll(-5 * block, 0),
            keys[torch.randperm(16, generator=generator)[place] * block],
        ]
    )
    q, k = 20 * q[None], keys.expand(1, 3, -1, -1)
    site = Site(grid)
    auto = MInference(0.125, block=block, sink=2).plan(q, k, k, site, None).block_mask.kept_blocks[0]
    assert auto[0, :, 11].all()
    assert auto[1].diagonal(5).all()
    fixed = {p: MInference(0.125, p, block, sink=2).plan(q, k, k, site, None) for p in PATTERNS}
    assert torch.equal(auto[0], fixed["vertical-slash"].block_mask.kept_blocks[0, 0])
    assert torch.equal(auto[1], fixed["vertical-slash"].block_mask.kept_blocks[0, 1])
    assert torch.equal(auto[2], fixed["block-sparse"].block_mask.kept_blocks[0, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 2}, "density"), ({"pattern": "slash"}, "pattern"), ({"rows": 0}, "rows"), ({"sink": 0}, "sink")],
)
def test_bad_parameters(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(**options)  # type: ignore[arg-type]
