"""The reference backend against float64 dense attention in the sequence's own order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import get_backend, reference
from dit_sparse.types import AttentionPlan
from tests.kernels import cases

REFERENCE = get_backend("reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bounds", [cases.EVEN, cases.TEXT, cases.UNEVEN], ids=str)
def test_equals_dense_attention_under_the_token_mask(dtype: torch.dtype, bounds: list[int]) -> None:
    plan = cases.random_plan(bounds, batch=2, heads=2)
    q, k, v = cases.inputs(plan, 2, 2, 16, dtype)
    order = plan.q_order
    out, lse = REFERENCE.forward(order.permute(q), order.permute(k), order.permute(v), plan, scale=0.3, return_lse=True)
    assert lse is not None
    got = order.restore(out), order.restore(lse)
    cases.assert_as_good_as_torch(got, q, k, v, plan.token_mask(), 0.3)


def test_chunks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.UNEVEN, heads=2)
    q, k, v = cases.inputs(plan, 1, 2, 16, torch.float64)
    whole = REFERENCE.forward(q, k, v, plan, scale=0.3, return_lse=True)
    monkeypatch.setattr(reference, "_CHUNK_SCORES", 1)
    by_row = REFERENCE.forward(q, k, v, plan, scale=0.3, return_lse=True)
    cases.assert_as_good_as_torch(by_row, q, k, v, cases.position_mask(plan), 0.3)
    torch.testing.assert_close(by_row, whole)


def test_the_predicate_gets_the_calls_own_batch_and_head() -> None:
    kept = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    seen: list[tuple[int, int]] = []

    def predicate(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        seen.append((int(batch.max()), int(head.max())))
        return q_token >= k_token

    plan = cases.keeping(kept, [0, 4, 8, 12], partial=kept, predicate=predicate)
    q, k, v = cases.inputs(plan, 2, 3, 16)
    REFERENCE.forward(q, k, v, plan, scale=0.3, return_lse=False)
    assert seen == [(1, 2)]


def test_has_a_backward() -> None:
    plan: AttentionPlan = cases.random_plan(cases.RAGGED, density=0.3)
    q, k, v = (x.requires_grad_() for x in cases.inputs(plan, 1, 1, 16))
    REFERENCE.forward(q, k, v, plan, scale=0.3, return_lse=False)[0].sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (q, k, v))


def test_refuses_integers() -> None:
    plan = cases.random_plan(cases.EVEN)
    q = torch.zeros(1, 1, 96, 16, dtype=torch.int32)
    assert "floating point" in str(REFERENCE.refuses(q, q, q, plan))
