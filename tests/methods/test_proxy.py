"""ProxyAttn against loops: the mean heads' largest logits, and budgets from sampled queries' attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import ProxyAttention, Site, TokenGrid
from dit_sparse.masks import probe_rows
from tests.methods.literal import GRIDS, best_per_row, random_qkv, raster_blocks, weights_of

BLOCK, ROWS, THRESHOLD = 8, 6, 0.7


def literal_need(q: Tensor, k: Tensor, grid: TokenGrid) -> float:
    """Share of the video's key blocks that one head needs."""
    blocks = [block for block in raster_blocks(grid, BLOCK) if not block.is_text]
    weights, counts = weights_of(q, k), []
    for row in probe_rows(grid, ROWS, q.device).tolist():
        masses = sorted((float(weights[row, block.tokens].sum()) for block in blocks), reverse=True)
        total = count = 0.0
        while total < THRESHOLD * sum(masses) - 1e-6:
            total += masses[int(count)]
            count += 1
        counts.append(max(count, 1))
    return sum(counts) / len(counts) / len(blocks)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6, None])
@pytest.mark.parametrize("groups", [1, 2])
def test_equals_the_literal_mask(grid: TokenGrid, density: float | None, groups: int) -> None:
    q, k, v = random_qkv(grid)
    method = ProxyAttention(density, THRESHOLD, groups, BLOCK, row_stride=1, rows=ROWS)
    mask, blocks = method.plan(q, k, v, Site(grid), None).token_mask(), raster_blocks(grid, BLOCK)
    members = [[0, 1, 2]] if groups == 1 else [[0, 1], [2]]
    for b in range(2):
        needs = [literal_need(q[b, h], k[b, h], grid) for h in range(3)]
        if density is None:
            pairs = grid.num_tokens**2
            budgets = [(pairs - (1 - need) * grid.video_len**2) / pairs for need in needs]
        else:
            full: set[int] = set()
            while True:
                free = [h for h in range(3) if h not in full]
                factor = (3 * density - len(full)) / sum(needs[h] for h in free)
                over = {h for h in free if needs[h] * factor > 1}
                if not over:
                    break
                full |= over
            budgets = [1.0 if h in full else needs[h] * factor for h in range(3)]
        for heads in members:
            proxy_q, proxy_k = (sum(x[b, h].double() for h in heads) / len(heads) for x in (q, k))
            logits = proxy_q @ proxy_k.T
            scores = [[float(logits[i.tokens][:, j.tokens].max()) for j in blocks] for i in blocks]
            for h in heads:
                want = best_per_row(lambda i, j, s=scores: s[i][j], blocks, blocks, grid.num_tokens, budgets[h])
                assert torch.equal(mask[b, h], want)


def test_diffuse_heads_get_more_and_the_mean_is_the_density() -> None:
    grid = TokenGrid(2, 16, 16)
    q, k, v = random_qkv(grid, batch=1, heads=4)
    q = q * torch.tensor([0.01, 1, 2, 4]).view(1, 4, 1, 1)
    density = ProxyAttention(0.25, block=16).plan(q, k, v, Site(grid), None).density[0]
    assert (density.diff() < 0).all()
    assert float(density.mean()) == pytest.approx(0.25, rel=0.1)


def test_fewer_queries_choose_much_the_same() -> None:
    grid = TokenGrid(2, 16, 16)
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 512, 16, generator=generator)
    q = 8 * torch.nn.functional.avg_pool1d(q[0].transpose(1, 2), 33, 1, 16).transpose(1, 2)[None]
    plans = [ProxyAttention(0.25, block=16, row_stride=n).plan(q, k, k, Site(grid), None) for n in (1, 4)]
    every, some = (plan.block_mask.kept_blocks for plan in plans)
    assert (every & some).sum() >= 0.7 * every.sum()
    assert not torch.equal(every, some)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"threshold": 1.1}, "threshold"), ({"groups": 0}, "groups")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProxyAttention(**options)  # type: ignore[arg-type]
