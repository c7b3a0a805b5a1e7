"""PISA against loops over blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import Pisa, Site, TokenGrid
from tests.methods.literal import GRIDS, Block, best_per_row, random_qkv, raster_blocks


def first_order(k: Tensor, v: Tensor, block: Block) -> Tensor:
    """The sum over one block of (k - mean(k))^T v."""
    middle = k[block.tokens].mean(0)
    return sum((torch.outer(k[t] - middle, v[t]) for t in block.tokens), torch.zeros(k.shape[1], v.shape[1]).double())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("covariance", "density"), [(False, 0.3), (True, 0.6), (None, 0.4)])
def test_equals_the_literal_mask(grid: TokenGrid, covariance: bool | None, density: float) -> None:
    tensors = random_qkv(grid)
    plan = Pisa(density, 8, covariance).plan(*tensors, Site(grid), None)
    assert plan.remainder == "value"
    blocks = raster_blocks(grid, 8)
    for b in range(2):
        for h in range(3):
            q, k, v = (x[b, h].double() for x in tensors)
            orders = [first_order(k, v, block) for block in blocks]
            mean = sum(orders) / len(orders)

            def score(i: int, j: int, q: Tensor = q, k: Tensor = k, orders=orders, mean=mean) -> float:
                logit = float(q[blocks[i].tokens].mean(0) @ k[blocks[j].tokens].mean(0)) / 4
                weight = math.exp(logit) * len(blocks[j].tokens)
                use = grid.frames == 1 if covariance is None else covariance
                return weight * float((orders[j] - mean).square().sum().sqrt()) if use else weight

            assert torch.equal(plan.token_mask()[b, h], best_per_row(score, blocks, blocks, grid.num_tokens, density))


@pytest.mark.parametrize(("options", "message"), [({"density": 0}, "density"), ({"block": 0}, "block")])
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pisa(**options)  # type: ignore[arg-type]
