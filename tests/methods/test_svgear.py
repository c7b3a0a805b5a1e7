"""SVG-EAR against errors, budgets and the greedy choice written out one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import Schedule, Site, SparseVideoGen2, SvgEar, TokenGrid, sparse_attention
from dit_sparse.types import AttentionPlan
from tests.methods.layouts import DEMO, GRIDS, check_text_and_rows, inputs, smooth_inputs
from tests.methods.test_svg2 import clusters


def literal_mask(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, p: float, least: int) -> Tensor:
    """`[B, H, N, N]` of the clusters in `plan`."""
    mask = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.bool)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            queries, keys = (clusters(order, b, h, grid) for order in (plan.q_order, plan.kv_order))
            for group in queries:
                if not group:
                    continue
                kept = choose(q[b, h, group].mean(0), k[b, h], v[b, h], keys, p, least)
                for token in group:
                    for number in kept:
                        mask[b, h, token, keys[number]] = True
    text = slice(grid.text_start, grid.text_start + grid.text_len)
    mask[..., text, :] = True
    mask[..., text] = True
    return mask


def choose(probe: Tensor, k: Tensor, v: Tensor, keys: list[list[int]], p: float, least: int) -> set[int]:
    """Numbers of the key clusters that one query cluster keeps."""
    scale = len(probe) ** -0.5
    weights = [len(c) * math.exp(scale * float(probe @ k[c].mean(0))) if c else 0.0 for c in keys]
    ranked = sorted(range(len(keys)), key=lambda j: -weights[j])
    budget, reached = 0, 0.0
    for place, j in enumerate(ranked):
        if reached < p * sum(weights) or place < 2 * least:
            budget += len(keys[j])
        reached += weights[j]
    kept = set(ranked[:least])
    spent = sum(len(keys[j]) for j in kept)

    def error_a_key(j: int) -> float:
        middle, of_mean = v[keys[j]].mean(0), math.exp(scale * float(probe @ k[keys[j]].mean(0)))
        lost = [(math.exp(scale * float(probe @ k[t])) * v[t] - of_mean * middle).square().sum() for t in keys[j]]
        return float(sum(lost)) / len(keys[j])

    others = [j for j in range(len(keys)) if j not in kept and keys[j]]
    for j in sorted(others, key=lambda j: -error_a_key(j)):
        if spent >= budget:
            break
        kept.add(j)
        spent += len(keys[j])
    return kept


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("p", "share"), [(0.8, 0.1), (0.3, 0.25)])
def test_equals_the_literal_selection(grid: TokenGrid, p: float, share: float) -> None:
    q, k, v = inputs(grid)
    method = SvgEar(top_p=p, min_kept=share, q_tokens=9, k_tokens=5)
    plan = method.plan(q, k, v, Site(grid), None)
    least = max(1, int(share * round(grid.video_len / 5)))
    want = literal_mask(plan, q, k, v, grid, p, least)
    assert torch.equal(plan.token_mask(), want)
    check_text_and_rows(plan, grid)


def test_the_choice_is_by_error_and_the_rest_is_summed_up() -> None:
    q, k, v = smooth_inputs(DEMO)
    plans = [cls(density=0.1, first_iterations=3).plan(q, k, v, Site(DEMO), None) for cls in (SvgEar, SparseVideoGen2)]
    assert [plan.remainder for plan in plans] == ["mean", "none"]
    assert not torch.equal(plans[0].block_mask.kept_blocks, plans[1].block_mask.kept_blocks)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    ours, theirs = ((sparse_attention(q, k, v, plan.with_remainder("mean")) - dense).square().mean() for plan in plans)
    assert ours < theirs, "of equally many clusters, those of largest error leave less of it"
    assert Schedule(SvgEar(), remainder="none").finish(plans[0]).remainder == "none"


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = SvgEar(density=density, first_iterations=3).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)
