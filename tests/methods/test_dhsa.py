"""DHSA against loops over tiles."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import Dhsa, Site, TokenGrid
from tests.methods.literal import GRIDS, Block, best_per_row, random_qkv, raster_blocks

TILE = (1, 2, 4)


def tile_blocks(grid: TokenGrid) -> list[Block]:
    """Tiles of the video in raster order, smaller at the borders; text in blocks of as many tokens as a tile."""
    tiles: dict[tuple[int, ...], list[int]] = {}
    for f in range(grid.frames):
        for h in range(grid.height):
            for w in range(grid.width):
                token = grid.video_start + (f * grid.height + h) * grid.width + w
                tiles.setdefault((f // TILE[0], h // TILE[1], w // TILE[2]), []).append(token)
    video = [Block(tokens, False) for _, tokens in sorted(tiles.items())]
    text = [block for block in raster_blocks(grid, TILE[0] * TILE[1] * TILE[2]) if block.is_text]
    return [*text, *video] if grid.text_first else [*video, *text]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6, 1.0])
def test_equals_the_literal_mask(grid: TokenGrid, density: float) -> None:
    q, k, v = random_qkv(grid)
    mask, blocks = Dhsa(density, TILE).plan(q, k, v, Site(grid), None).token_mask(), tile_blocks(grid)
    for b in range(2):
        for h in range(3):

            def chunk(x: torch.Tensor, block: Block, b: int = b, h: int = h) -> torch.Tensor:
                return x[b, h, block.tokens].double().mean(0) * len(block.tokens) ** 0.5

            scores = [[float(chunk(q, query) @ chunk(k, key)) for key in blocks] for query in blocks]
            want = best_per_row(lambda i, j, s=scores: s[i][j], blocks, blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_tokens_may_stand_in_the_shared_order_already() -> None:
    grid = TokenGrid(3, 5, 7, 4)
    q, k, v = random_qkv(grid)
    method = Dhsa(0.4, TILE)
    order = method.shared_order(grid, q.device)
    want = method.plan(q, k, v, Site(grid), None)
    got = method.plan(order.permute(q), order.permute(k), v, Site(grid, in_order=True), None)
    assert torch.equal(got.block_mask.kept_blocks, want.block_mask.kept_blocks)


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"tile": (0, 8, 8)}, "tile"), ({"tile": (8, 8)}, "tile")]
)
def test_bad_parameters(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Dhsa(**options)  # type: ignore[arg-type]
