"""Remainders against loops written literally from their definition in `AttentionPlan`, in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import get_backend
from dit_sparse.kernels.remainder import LARGEST_SPREAD
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockMask, Remainder
from tests.kernels import cases

REFERENCE = get_backend("reference")
# So few tokens that the factor of "mass" reaches their number.
SMALL = [0, 2, 4, 7, 12, 14, 16, 40]
SUMS_UP = [name for name in REMAINDERS if name != "none"]


def run(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float = 0.3) -> tuple[Tensor, Tensor]:
    out, lse = REFERENCE.forward(q, k, v, plan, scale=scale, return_lse=True)
    assert lse is not None
    return out, lse


def literal(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, one head, query block, key block and query at a time."""
    batch, heads, rows, _ = q.shape
    out, lse = torch.zeros(batch, heads, rows, v.shape[-1]).double(), torch.full(q.shape[:3], -math.inf).double()
    allowed = cases.position_mask(plan).expand(batch, heads, -1, -1)
    kept_blocks = plan.block_mask.kept_blocks.expand(batch, heads, -1, -1)
    for b in range(batch):
        for h in range(heads):
            q_bounds, k_bounds = (
                order.offsets[b % order.offsets.shape[0], h % order.offsets.shape[1]].tolist()
                for order in (plan.q_order, plan.kv_order)
            )
            spans = list(pairwise(k_bounds))
            for i, (start, stop) in enumerate(pairwise(q_bounds)):
                if start == stop:
                    continue
                own = plan.remainder if plan.head_remainders is None else REMAINDERS[int(plan.head_remainders[b, h])]
                terms = left_over(q[b, h, start:stop], k[b, h], v[b, h], spans, kept_blocks[b, h, i], scale, own)
                for row in range(start, stop):
                    keys = allowed[b, h, row].nonzero()[:, 0]
                    weights = (k[b, h, keys] @ q[b, h, row] * scale).exp()
                    top, bottom = weights @ v[b, h, keys], weights.sum()
                    tail = torch.zeros(()).double()
                    for _, size, larger, key, value, _ in terms:
                        weight = size * math.exp(scale * float(q[b, h, row] @ key) + larger)
                        top, tail = top + weight * value, tail + weight
                    if own in ("value", "mass") and terms:
                        slope = sum(share * products for share, *_, products in terms)
                        top = top + tail * scale * (q[b, h, row] @ slope)
                    bottom = bottom + tail
                    if bottom > 0:
                        out[b, h, row], lse[b, h, row] = top / bottom, bottom.log()
    return out, lse


def left_over(q: Tensor, k: Tensor, v: Tensor, spans: list, kept: Tensor, scale: float, own: Remainder) -> list:
    """(share, size, log of the factor of "mass", mean key, mean value, products) of each block in U(I)."""
    terms = []
    for j, (start, stop) in enumerate(spans):
        if own == "none" or kept[j] or start == stop:
            continue
        size, key, value = stop - start, k[start:stop].mean(0), v[start:stop].mean(0)
        variance = ((k[start:stop] - key) ** 2).mean(0)
        spread = 0.5 * scale**2 * float((q**2).mean(0) @ variance)
        if spread > LARGEST_SPREAD:
            continue
        larger = min(spread, math.log(size)) if own == "mass" else 0.0
        products = sum(torch.outer(k[t] - key, v[t]) for t in range(start, stop)) / size
        share = size * math.exp(scale * float(q.mean(0) @ key) + larger)
        terms.append((share, size, larger, key, value, products))
    total = sum(term[0] for term in terms)
    return [(share / total, *rest) for share, *rest in terms]


def assert_equals_the_loop(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float = 0.3) -> None:
    out, lse = run(q, k, v, plan, scale)
    want, sums = literal(q, k, v, plan, scale)
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, sums, rtol=1e-10, atol=1e-10)


def some_blocks_are_spread(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Larger scores, and wider keys in the second third, so that the limit of the spread decides both ways."""
    k = k.clone()
    k[:, :, k.shape[2] // 3 : 2 * k.shape[2] // 3] *= 3
    return q * 1.5, k


@pytest.mark.parametrize("remainder", REMAINDERS)
@pytest.mark.parametrize("bounds", [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN, SMALL], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_equals_a_literal_loop(remainder: Remainder, bounds: list[int], own: bool) -> None:
    lead = (2, 2) if own else (1, 1)
    plan = cases.random_plan(bounds, batch=lead[0], heads=lead[1]).with_remainder(remainder)
    q, k, v = cases.inputs(plan, 2, 2, 8, torch.float64)
    assert_equals_the_loop(*some_blocks_are_spread(q, k), v, plan)


def test_heads_with_remainders_of_their_own() -> None:
    plan = cases.own_remainders()
    q, k, v = cases.inputs(plan, 2, 2, 8, torch.float64)
    assert_equals_the_loop(*some_blocks_are_spread(q, k), v, plan)


@pytest.mark.parametrize("remainder", SUMS_UP)
def test_blocks_kept_in_part_leave_nothing(remainder: Remainder) -> None:
    order = cases.random_order([cases.RAGGED], 1, 2)
    draw = cases.generator()
    kept, partial = (torch.rand(1, 2, 6, 6, generator=draw) < share for share in (0.5, 0.5))
    plan = AttentionPlan.from_kept(
        order, kept, partial=partial, predicate=lambda b, h, i, j: (i - j + h) % 4 == 0, remainder=remainder
    )
    q, k, v = cases.inputs(plan, 1, 2, 8, torch.float64)
    assert_equals_the_loop(q, k, v, plan)


@pytest.mark.parametrize("remainder", SUMS_UP)
def test_queries_and_keys_with_blocks_of_their_own(remainder: Remainder) -> None:
    key_bounds = [cases.UNEVEN, [0, 60, 61, 80, 100, 121, 121]]
    orders = cases.random_order([cases.RAGGED], 1, 1), cases.random_order(key_bounds, 1, 2)
    kept = torch.rand(1, 2, 6, 6, generator=cases.generator()) < 0.4
    plan = AttentionPlan(*orders, BlockMask.from_bool(kept, *(o.offsets for o in orders)), remainder)
    q, k, v = cases.inputs(plan, 1, 2, 8, torch.float64)
    assert_equals_the_loop(q, k, v[..., :5], plan)


@pytest.mark.parametrize("remainder", SUMS_UP)
def test_rows_that_keep_everything_and_rows_that_keep_nothing(remainder: Remainder) -> None:
    kept = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    kept[..., 1, :], kept[..., 2, 3] = True, True
    plan = cases.keeping(kept, cases.RAGGED, remainder=remainder)
    q, k, v = cases.inputs(plan, 1, 1, 8, torch.float64)
    assert_equals_the_loop(q, k, v, plan)
    out, lse = run(q, k, v, plan)
    dense = cases.oracle(q, k, v, torch.ones(1, 1, 91, 91, dtype=torch.bool), 0.3)
    torch.testing.assert_close((out[..., 16:32, :], lse[..., 16:32]), (dense[0][..., 16:32, :], dense[1][..., 16:32]))
    assert lse.isfinite().all()


@pytest.mark.parametrize("remainder", SUMS_UP)
def test_one_token_blocks_make_it_dense(remainder: Remainder) -> None:
    plan = cases.keeping(torch.rand(1, 2, 40, 40) < 0.3, list(range(41)), remainder=remainder)
    q, k, v = cases.inputs(plan, 1, 2, 8, torch.float64)
    want = cases.oracle(q, k, v, torch.ones(1, 2, 40, 40, dtype=torch.bool), 0.3)
    torch.testing.assert_close(run(q, k, v, plan), want)


@pytest.mark.parametrize("remainder", SUMS_UP)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_above_zero(remainder: Remainder, scale: float) -> None:
    plan = cases.random_plan(cases.RAGGED).with_remainder(remainder)
    q, k, v = cases.inputs(plan, 1, 1, 8, torch.float64)
    assert_equals_the_loop(q, k, v, plan, scale)


def test_each_order_of_the_expansion_is_nearer_to_dense() -> None:
    """Smooth keys, as neighbours in space are: the expansion converges."""
    draw = cases.generator(3)
    centres = torch.randn(6, 16, generator=draw).double()
    plan = cases.random_plan(cases.EVEN, density=0.3)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.float64)
    k = centres.repeat_interleave(16, 0) + 0.4 * k
    v = v + 2 * k
    dense = cases.oracle(q, k, v, torch.ones(96, 96, dtype=torch.bool), 0.3)[0]
    errors = [float((run(q, k, v, plan.with_remainder(r))[0] - dense).norm()) for r in REMAINDERS]
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 0.7 * errors[1]
    assert errors[3] < errors[2]


@pytest.mark.parametrize("remainder", SUMS_UP)
def test_has_a_backward(remainder: Remainder) -> None:
    kept = torch.rand(1, 1, 6, 6, generator=cases.generator()) < 0.3
    kept[..., 2, :], kept[..., 4, :] = True, False
    plan = cases.keeping(kept, cases.RAGGED, remainder=remainder)
    q, k, v = (x.requires_grad_() for x in cases.inputs(plan, 1, 1, 8, torch.float64))
    assert torch.autograd.gradcheck(lambda q, k, v: run(q, k, v, plan), (q, k, v), fast_mode=True)


def test_rows_without_a_key_or_a_remainder_are_empty() -> None:
    plan, (q, k, v) = cases.nothing_left("value")
    out, lse = run(q, k, v, plan)
    cases.assert_as_good_as_torch((out, lse), q, k, v, cases.position_mask(plan), 0.3)
    assert lse[..., 64:80].isneginf().all()
    assert lse[..., 50].isneginf().all()
