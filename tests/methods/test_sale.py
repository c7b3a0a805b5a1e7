"""SALE against loops: 4-bit values, relative attention scores, the largest of a block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import Sale, Site, TokenGrid
from dit_sparse.methods.sale import round_to_4_bits
from tests.methods.literal import GRIDS, best_per_row, fill, random_qkv, raster_blocks

BLOCK = 4


def four_bits(row: Tensor) -> Tensor:
    """One token's channels as integers from -7 to 7 times a step."""
    step = float(row.abs().max()) / 7
    return torch.tensor([round(float(value) / step) * step for value in row], dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.4, 0.7, None])
def test_equals_the_literal_mask(grid: TokenGrid, density: float | None) -> None:
    q, k, v = random_qkv(grid)
    method = Sale(density, threshold=0.4, block=BLOCK, row_stride=1)
    mask, blocks = method.plan(q, k, v, Site(grid), None).token_mask(), raster_blocks(grid, BLOCK)
    first = next(i for i, block in enumerate(blocks) if not block.is_text)
    for b in range(2):
        for h in range(3):
            mean = k[b, h].mean(0)
            rough_q = [four_bits(row) for row in q[b, h]]
            rough_k = torch.stack([four_bits(row - mean) for row in k[b, h]])
            always = {
                (i, j)
                for i, query in enumerate(blocks)
                for j, key in enumerate(blocks)
                if j == first or (abs(i - j) <= 1 and query.is_text == key.is_text)
            }
            scores = {}
            for i, query in enumerate(blocks):
                for j, key in enumerate(blocks):
                    best = 0.0
                    for token in query.tokens:
                        logits = (rough_k @ rough_q[token] / math.sqrt(q.shape[-1])).tolist()
                        inside = [t for n, other in enumerate(blocks) if (i, n) in always for t in other.tokens]
                        reference = max(logits[t] for t in inside)
                        best = max(best, *(math.exp(logits[t] - reference) for t in key.tokens))
                    scores[i, j] = math.inf if (i, j) in always else best
            if density is None:
                chosen = {pair for pair, score in scores.items() if score >= 0.4}
                want = fill(chosen, blocks, blocks, grid.num_tokens)
            else:
                want = best_per_row(lambda i, j, s=scores: s[i, j], blocks, blocks, grid.num_tokens, density)
            assert torch.equal(mask[b, h], want)


def test_rounding_has_fifteen_steps_and_errs_by_half_a_step() -> None:
    x = torch.randn(1, 1, 50, 64, generator=torch.Generator().manual_seed(0))
    rough = round_to_4_bits(x)
    step = x.abs().amax(-1, keepdim=True) / 7
    assert len((rough / step).round().unique()) <= 15
    assert ((rough - x).abs() <= step / 2 + 1e-6).all()
    assert not round_to_4_bits(torch.zeros(1, 1, 2, 4)).isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"threshold": 0}, "threshold"), ({"window": -1}, "window"), ({"sink": 0}, "sink")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sale(**options)  # type: ignore[arg-type]
