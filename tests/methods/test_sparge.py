"""SpargeAttn's first stage against means, cosines and shares taken block by block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, SpargeAttention, TokenGrid
from dit_sparse.reorder import curve_order
from tests.methods.layouts import (
    DEMO,
    GRIDS,
    blocks_of,
    check_text_and_rows,
    cut,
    inputs,
    smooth_inputs,
    tokens_of,
)
from tests.methods.test_no_wait import NoWaiting


def cosine(x: Tensor) -> float:
    """Mean over every two rows of `x`, themselves included."""
    total = 0.0
    for a in x.double():
        for b in x.double():
            total += float(a @ b / (a.norm() * b.norm()))
    return total / len(x) ** 2


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, p: float, similarity: float) -> tuple[Tensor, set[str]]:
    """`[N, N]` of one head with blocks of 8 queries and 4 keys; and which cases occurred."""
    video = [t - grid.video_start for t in curve_order(grid, 4).index[0, 0].tolist()]
    video = [t for t in video if 0 <= t < grid.video_len]
    q_blocks, k_blocks = blocks_of(grid, cut(video, 8), 8), blocks_of(grid, cut(video, 4), 4)
    smooth = k.double() - k.double().mean(0)
    alike = [cosine(smooth[keys]) > similarity for keys, _ in k_blocks]
    kept, cases = [], set()
    for queries, q_text in q_blocks:
        middle = q[queries].double().mean(0)
        weights = [
            math.exp(float(middle @ smooth[keys].mean(0)) / math.sqrt(q.shape[-1])) if a and not text else 0.0
            for (keys, text), a in zip(k_blocks, alike, strict=True)
        ]
        chosen, reached = set(), 0.0
        for j in sorted(range(len(weights)), key=lambda j: -weights[j]):
            if chosen and reached >= p * sum(weights):
                break
            chosen.add(j)
            reached += weights[j]
        trusted = cosine(q[queries]) > similarity
        cases.add("query alike" if trusted else "query unlike")
        cases |= {"key alike" if a else "key unlike" for a, (_, text) in zip(alike, k_blocks, strict=True) if not text}
        cases |= {"dropped"} if trusted and not q_text and len(chosen) < sum(alike) else set()
        kept.append([not trusted or not a or j in chosen for j, a in enumerate(alike)])
    return tokens_of(q_blocks, k_blocks, kept), cases


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.8])
def test_equals_the_literal_first_stage(grid: TokenGrid, p: float) -> None:
    q, k, v = inputs(grid, dim=3)
    plan = SpargeAttention(top_p=p, similarity=0.25, block_q=8, block_k=4).plan(q, k, v, Site(grid), None)
    got, cases = plan.token_mask(), set()
    for b in range(2):
        for h in range(2):
            want, seen = literal_mask(q[b, h], k[b, h], grid, p, 0.25)
            assert torch.equal(got[b, h], want)
            cases |= seen
    assert len(cases) == 5, cases
    check_text_and_rows(plan, grid)


def test_without_any_block_that_is_alike_all_are_kept() -> None:
    grid = TokenGrid(2, 4, 4, text_len=3)
    q, k, v = inputs(grid)
    assert SpargeAttention(similarity=1.0, block_q=8, block_k=8).plan(q, k, v, Site(grid), None).density.min() == 1


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = SpargeAttention(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_by_density_a_row_keeps_its_best_products_of_means(grid: TokenGrid) -> None:
    q, k, v = inputs(grid, batch=1, heads=1)
    plan = SpargeAttention(density=0.6, block_q=8, block_k=4).plan(q, k, v, Site(grid), None)
    video = [t - grid.video_start for t in curve_order(grid, 4).index[0, 0].tolist()]
    video = [t for t in video if 0 <= t < grid.video_len]
    mask, counts = plan.token_mask()[0, 0], set()
    for queries, q_text in blocks_of(grid, cut(video, 8), 8):
        middle = q[0, 0, queries].double().mean(0)
        products: dict[bool, list[float]] = {}
        for keys, k_text in blocks_of(grid, cut(video, 4), 4):
            if not q_text and not k_text:
                products.setdefault(bool(mask[queries[0], keys[0]]), []).append(
                    float(middle @ k[0, 0, keys].double().mean(0))
                )
        if not q_text:
            assert min(products[True]) > max(products[False])
            counts.add(len(products[True]))
    assert len(counts) == 1


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    for method in (SpargeAttention(density=0.5, block_q=8, block_k=4), SpargeAttention(block_q=8, block_k=4)):
        want = method.plan(q, k, v, Site(grid), None)
        with NoWaiting():
            got = method.plan(q, k, v, Site(grid), None)
        assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"top_p": 1.1}, "top_p"), ({"block_k": 0}, "block_k"), ({"similarity": 2}, "simil")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpargeAttention(**options)  # type: ignore[arg-type]
