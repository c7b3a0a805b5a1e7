"""SVG2 against cluster products, weights and top-p written out one by one."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, SparseVideoGen2, TokenGrid
from dit_sparse.types import AttentionPlan, Previous, TokenOrder
from tests.methods.layouts import DEMO, GRIDS, check_text_and_rows, inputs, smooth_inputs


def literal_mask(plan: AttentionPlan, q: Tensor, k: Tensor, grid: TokenGrid, p: float, least: int) -> Tensor:
    """`[B, H, N, N]` of the clusters in `plan`."""
    mask = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.bool)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            queries, keys = (clusters(order, b, h, grid) for order in (plan.q_order, plan.kv_order))
            for group in queries:
                middle = q[b, h, group].double().mean(0)
                weights = [
                    len(other) * math.exp(float(middle @ k[b, h, other].double().mean(0)) / q.shape[-1] ** 0.5)
                    if other
                    else 0.0
                    for other in keys
                ]
                kept, reached = [], 0.0
                for number in sorted(range(len(keys)), key=lambda j: -weights[j]):
                    if reached >= p * sum(weights) and len(kept) >= least:
                        break
                    kept.append(number)
                    reached += weights[number]
                for token in group:
                    for number in kept:
                        mask[b, h, token, keys[number]] = True
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    mask[..., text, :] = True
    mask[..., text] = True
    return mask


def clusters(order: TokenOrder, b: int, h: int, grid: TokenGrid) -> list[list[int]]:
    """Tokens of each video cluster."""
    bounds, index = order.offsets[b, h].tolist(), order.index[b, h].tolist()
    found = [index[start:end] for start, end in pairwise(bounds)]
    text = range(grid.text_start, grid.text_start + grid.text_len)
    return [tokens for tokens in found if not tokens or tokens[0] not in text]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("p", "share"), [(0.7, 0.01), (0.3, 0.5)])
def test_equals_the_literal_selection(grid: TokenGrid, p: float, share: float) -> None:
    q, k, v = inputs(grid)
    method = SparseVideoGen2(top_p=p, min_kept=share, q_tokens=9, k_tokens=5)
    plan = method.plan(q, k, v, Site(grid), None)
    least = max(1, int(share * round(grid.video_len / 5)))
    assert torch.equal(plan.token_mask(), literal_mask(plan, q, k, grid, p, least))
    check_text_and_rows(plan, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_later_plans_start_from_the_last_ones_clusters(grid: TokenGrid) -> None:
    """Unchanged tokens: two more iterations go on where the first ended, and each brings tokens nearer."""
    q, k, v = inputs(grid)
    method = SparseVideoGen2(q_tokens=9, k_tokens=5, first_iterations=3)
    first = method.plan(q, k, v, Site(grid), None)
    second = method.plan(q, k, v, Site(grid), Previous(first.pack(), None, 0))
    straight = SparseVideoGen2(q_tokens=9, k_tokens=5, first_iterations=5).plan(q, k, v, Site(grid), None)
    assert torch.equal(second.kv_order.offsets, straight.kv_order.offsets)
    assert torch.equal(second.kv_order.index, straight.kv_order.index)
    assert not torch.equal(first.kv_order.index, second.kv_order.index)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = SparseVideoGen2(density=density, first_iterations=3).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"top_p": 2}, "top_p"), ({"q_tokens": 0}, "q_tokens"), ({"iterations": 0}, "iter")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVideoGen2(**options)  # type: ignore[arg-type]
