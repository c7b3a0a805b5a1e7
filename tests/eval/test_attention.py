"""Nearness of attention outputs, and recall of attention mass against the whole attention map."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dit_sparse import AdaSpa, Neighborhood, PbsAttention, Site, TokenGrid
from dit_sparse.eval.attention import cosine_similarity, mass_recall, relative_l1
from dit_sparse.types import Method
from tests.methods.literal import random_qkv, weights_of


@pytest.mark.parametrize(
    "method",
    [AdaSpa(0.4, block=8), PbsAttention(0.4, block=8, segment=16), Neighborhood(window=(1, 3, 3), tile=(1, 2, 2))],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("text", [0, 5])
def test_recall_is_the_mass_under_the_token_mask(method: Method, text: int) -> None:
    grid = TokenGrid(2, 5, 6, text)
    q, k, _ = random_qkv(grid, batch=1)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    plan = method.plan(q, k, k, Site(grid), None)
    mask = plan.token_mask().expand(1, 3, -1, -1)
    found = mass_recall(plan, q, k, lse)
    for h in range(3):
        weights = weights_of(q[0, h], k[0, h])
        want = float((weights * mask[0, h]).sum() / weights.sum())
        assert float(found[0, h]) == pytest.approx(want, abs=1e-5)


def test_recall_of_a_full_plan_is_one() -> None:
    grid = TokenGrid(1, 4, 4)
    q, k, _ = random_qkv(grid, batch=1)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    plan = AdaSpa(1, block=4).plan(q, k, k, Site(grid), None)
    assert torch.allclose(mass_recall(plan, q, k, lse), torch.ones(1, 3), atol=1e-5)


def test_outputs_against_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(2, 3, 5, 4, generator=generator)
    out = reference + 0.1 * torch.randn(2, 3, 5, 4, generator=generator)
    a, b = out.double().numpy().ravel(), reference.double().numpy().ravel()
    assert relative_l1(out, reference) == pytest.approx(np.abs(a - b).sum() / np.abs(b).sum())
    assert cosine_similarity(out, reference) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert relative_l1(reference, reference) == 0
    assert cosine_similarity(3 * reference, reference) == pytest.approx(1)
    assert cosine_similarity(out.bfloat16(), reference.bfloat16()) == pytest.approx(0.995, abs=5e-3)


@pytest.mark.parametrize(
    ("out", "reference", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"one shape and an element, got \[2, 3\] and \[3, 2\]"),
        (torch.ones(0), torch.ones(0), "an element"),
        (torch.full((2,), float("nan")), torch.ones(2), "must be finite"),
        (torch.ones(2), torch.zeros(2), "reference is all zero"),
    ],
)
def test_what_cannot_be_compared_is_refused(out: torch.Tensor, reference: torch.Tensor, message: str) -> None:
    for measure in (relative_l1, cosine_similarity):
        with pytest.raises(ValueError, match=message):
            measure(out, reference)


def test_zero_has_no_direction() -> None:
    with pytest.raises(ValueError, match="out is all zero"):
        cosine_similarity(torch.zeros(2), torch.ones(2))
