"""LServe against loops: bounds on logical pages, sink and window, the heads that stream."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import LServe, Site, TokenGrid
from dit_sparse.masks import probe_rows
from dit_sparse.methods.lserve import page_bounds
from dit_sparse.reorder import raster_order
from tests.methods.literal import GRIDS, Block, best_per_row, random_qkv, raster_blocks, weights_of

BLOCK, PAGE, ROWS = 8, 3, 6


def literal_bound(q: Tensor, k: Tensor, query: Block, key: Block) -> float:
    mean, best = q[query.tokens].double().mean(0), -torch.inf
    for start in range(0, len(key.tokens), PAGE):
        page = k[key.tokens[start : start + PAGE]].double()
        bound = 0.0
        for channel in range(q.shape[-1]):
            low, high = float(page[:, channel].min()), float(page[:, channel].max())
            bound += max(float(mean[channel]) * low, float(mean[channel]) * high)
        best = max(best, bound)
    return best


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
@pytest.mark.parametrize("streaming", [0.0, 0.34, 1.0])
def test_equals_the_literal_mask(grid: TokenGrid, density: float, streaming: float) -> None:
    q, k, v = random_qkv(grid)
    method = LServe(density, streaming, BLOCK, PAGE, rows=ROWS)
    mask, blocks = method.plan(q, k, v, Site(grid), None).token_mask(), raster_blocks(grid, BLOCK)
    first = next(i for i, block in enumerate(blocks) if not block.is_text)
    window = best_per_row(lambda i, j: 1000 if j == first else -abs(i - j), blocks, blocks, grid.num_tokens, density)
    rows = probe_rows(grid, ROWS, q.device).tolist()
    for b in range(2):
        found = [float((weights_of(q[b, h], k[b, h])[rows] * window[rows]).sum()) for h in range(3)]
        streams = sorted(range(3), key=lambda h: -found[h])[: round(3 * streaming)]
        for h in range(3):
            bounds = [[literal_bound(q[b, h], k[b, h], i, j) for j in blocks] for i in blocks]
            pages = best_per_row(lambda i, j, s=bounds: s[i][j], blocks, blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], window if h in streams else pages)


def test_bounds_are_above_every_product_of_the_mean_query() -> None:
    grid = TokenGrid(1, 5, 7)
    q, k, _ = random_qkv(grid)
    order = raster_order(grid, BLOCK)
    bounds = page_bounds(q, k, order, 4)
    for i, query in enumerate(raster_blocks(grid, BLOCK)):
        products = q[:, :, query.tokens].mean(2, keepdim=True) @ k.transpose(-1, -2)
        for j, key in enumerate(raster_blocks(grid, BLOCK)):
            assert (bounds[:, :, i, j] >= products[..., 0, key.tokens].amax(-1) - 1e-4).all()
    exact = page_bounds(q, k, order, 1)
    assert (exact <= bounds + 1e-4).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"streaming": 1.5}, "streaming"), ({"page": 0}, "page"), ({"sink": 0}, "sink")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LServe(**options)  # type: ignore[arg-type]
