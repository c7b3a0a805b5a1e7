"""What analysis measures against the whole attention map, and what it samples."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_sparse import AdaSpa, Neighborhood, Oracle, PbsAttention, Site, TokenGrid, sparse_attention
from dit_sparse.analyze import Analysis, Candidate, candidates
from dit_sparse.analyze.sample import Probe, token_rows
from dit_sparse.masks import probe_rows
from dit_sparse.methods import METHODS
from dit_sparse.types import Method, Previous
from tests.methods.literal import random_qkv

PLANNERS: list[Method] = [
    AdaSpa(0.4, block=8),
    PbsAttention(0.4, block=8, segment=16),  # an order a head
    Neighborhood(window=(1, 3, 3), tile=(1, 2, 2)),  # blocks that are cut
]


def call(grid: TokenGrid, heads: int = 3):
    q, k, v = (x[:, :heads] for x in random_qkv(grid, batch=2))
    lse = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)
    return q, k, v, lse


@pytest.mark.parametrize("method", PLANNERS, ids=lambda m: m.name)
@pytest.mark.parametrize("text", [0, 5])
def test_the_rows_are_those_of_the_token_mask(method, text) -> None:
    grid = TokenGrid(2, 5, 6, text)
    q, k, v, lse = call(grid)
    plan = method.plan(q, k, v, Site(grid), Previous(lse=lse))
    tokens = torch.tensor([0, 7, 31, grid.num_tokens - 1])
    want = plan.token_mask().expand(2, 3, -1, -1)[:, :, tokens]
    assert torch.equal(token_rows(plan, 2, 3, tokens), want)


@pytest.mark.parametrize("method", PLANNERS, ids=lambda m: m.name)
def test_recall_and_error_are_those_of_attention_under_the_mask(method) -> None:
    grid = TokenGrid(2, 5, 6)
    q, k, v, lse = call(grid)
    plan = method.plan(q, k, v, Site(grid), Previous(lse=lse))
    tokens = probe_rows(grid, 16, q.device)
    recall, error = Probe(q, k, v, lse, tokens).measure(plan)
    mask = plan.token_mask().expand(2, 3, -1, -1)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    assert torch.allclose(recall, (weights * mask).sum(-1)[:, :, tokens].mean(-1), atol=1e-5)
    sparse, dense = (F.scaled_dot_product_attention(q, k, v, attn_mask=m)[:, :, tokens] for m in (mask, None))
    want = (sparse - dense).norm(dim=(-1, -2)) / dense.norm(dim=(-1, -2))
    assert torch.allclose(error, want, atol=1e-5)


@pytest.mark.parametrize("remainder", ["mean", "value", "mass"])
def test_the_error_is_that_with_the_remainder(remainder) -> None:
    grid = TokenGrid(2, 5, 6)
    q, k, v, lse = call(grid)
    tokens = probe_rows(grid, 16, q.device)
    probe = Probe(q, k, v, lse, tokens)
    fine, coarse = (AdaSpa(0.4, block=block).plan(q, k, v, Site(grid), Previous(lse=lse)) for block in (1, 8))
    recall, without = probe.measure(fine)
    assert float(without.min()) > 0.03
    # Blocks of one token leave nothing out that a remainder does not put back.
    again, error = probe.measure(fine.with_remainder(remainder))
    assert torch.equal(again, recall)
    assert float(error.max()) < 1e-5
    plan = coarse.with_remainder(remainder)
    _, error = probe.measure(plan)
    dense = F.scaled_dot_product_attention(q, k, v)[:, :, tokens]
    sparse = sparse_attention(q, k, v, plan, backend="reference")[:, :, tokens]
    assert torch.allclose(error, (sparse - dense).norm(dim=(-1, -2)) / dense.norm(dim=(-1, -2)), atol=1e-5)


def test_what_is_sampled() -> None:
    """The first and the last layer, one guidance branch, the steps asked for, a few heads of all."""
    analysis = Analysis([Candidate("adaspa", AdaSpa(0.5, block=8), 0.5)], (0.0, 0.5), layers=3, heads=2, rows=8)
    grid = TokenGrid(2, 4, 4)
    for step in range(4):
        for branch in ("cond", "uncond"):
            for layer in range(9):
                site = Site(grid, layer=layer, num_layers=9, step=step, num_steps=4, branch=branch)
                analysis(site, *call(grid))
    assert analysis.sampled == {"layers": [0, 4, 8], "heads": [0, 2], "steps": [0, 2]}
    assert [(row.step, row.layer) for row in analysis.rows] == [(step, layer) for step in (0, 2) for layer in (0, 4, 8)]
    assert all(len(row.recall) == 2 for row in analysis.rows)
    assert [row.reused is None for row in analysis.rows] == [True] * 3 + [False] * 3


def test_a_plan_is_as_good_as_new_while_nothing_changes_and_no_longer() -> None:
    """`reused` is near 1 on the same attention, and below it on another."""
    grid, torch_seed = TokenGrid(2, 8, 8), 0
    torch.manual_seed(torch_seed)
    q, k, v = 3 * torch.randn(3, 1, 2, grid.num_tokens, 16)
    analysis = Analysis([Candidate("oracle", Oracle(0.25, block=8), 0.25)], (0.0, 0.4, 0.8), layers=1, heads=2)
    for step, keys in ((0, k), (2, k), (4, k.flip(2))):
        lse = (q @ keys.transpose(-1, -2) / 4).logsumexp(-1)
        analysis(Site(grid, num_layers=1, step=step, num_steps=5), q, keys, v, lse)
    assert analysis.rows[1].reused == pytest.approx(1)
    assert analysis.rows[2].reused < 0.9
    analysis.forget_plans()
    analysis(Site(grid, num_layers=1, step=0, num_steps=5), q, k, v, lse)
    assert analysis.rows[-1].reused is None


def test_what_does_not_fit_is_left_out_with_its_reason() -> None:
    window = Candidate("neighborhood", Neighborhood(window=(9, 9, 9)), None)
    analysis = Analysis([window, Candidate("adaspa", AdaSpa(0.5, block=8), 0.5)], (0.0,), layers=1)
    grid = TokenGrid(2, 4, 4)
    analysis(Site(grid), *call(grid))
    assert {row.label for row in analysis.rows} == {"adaspa 0.5"}
    assert "window" in analysis.skipped["neighborhood"]


def test_candidates() -> None:
    labels = [
        candidate.label
        for candidate in candidates(["adaspa", "xattention:block=64", "neighborhood:window=1x3x3"], (0.5, 0.25))
    ]
    assert labels == [
        *("adaspa 0.5", "adaspa 0.25"),
        *("xattention:block=64 0.5", "xattention:block=64 0.25", "xattention:block=64"),
        "neighborhood:window=1x3x3",
    ]
    everything = {candidate.method.name for candidate in candidates(None, (0.25,))}
    assert everything == set(METHODS) - {"dense", "paro", "seer"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: candidates(["adaspe"], (0.5,)), "did you mean 'adaspa'"),
        (lambda: candidates(["adaspa:blok=3"], (0.5,)), "did you mean 'block'"),
        (lambda: candidates(["adaspa"], (1.5,)), "density must be above 0"),
        (lambda: candidates([], (0.5,)), "something to compare"),
        (lambda: Analysis([], (1.0,)), "shares of the run"),
        (lambda: Analysis([], ()), "shares of the run"),
        (lambda: Analysis([], heads=0), "heads must be at least 1, got 0"),
    ],
)
def test_bad_input(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()
