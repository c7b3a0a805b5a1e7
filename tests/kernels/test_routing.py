"""Blocks routed as attention is computed: against a loop over blocks, and against the plan that is made beforehand."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_sparse.block_mask import pack_words
from dit_sparse.kernels import (
    Route,
    check_routed_call,
    deviations,
    routed_attention,
    routed_plan,
    triton_routing,
)
from dit_sparse.types import BlockMask, TokenOrder
from tests.kernels import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Blocks, and which of them hold no video; some are empty.
LAYOUTS = {
    "even": (list(range(0, 161, 16)), []),
    "ragged": ([*range(0, 150, 16), 150], []),
    "text": ([*range(0, 129, 16), 137, 150], [8, 9]),
    "text first": ([0, 9, *range(16, 145, 16), 150], [0, 1]),
    "uneven": ([0, 1, 40, 40, 53, 77, 100, 120, 121], []),
    "more than a tile of means": (list(range(0, 145, 8)), []),
}


def make_route(name: str, tau: float) -> Route:
    bounds, others = LAYOUTS[name]
    order = TokenOrder.from_index(torch.arange(bounds[-1]), torch.tensor(bounds), is_identity=True)
    number = torch.arange(order.num_blocks)
    forced = (number[:, None] - number).abs() <= 1
    counted = order.offsets[0, 0].diff() > 0
    for j in others:
        forced[j] = forced[:, j] = True
        counted[j] = False
    return Route(order, forced[None, None], pack_words(forced[None, None]), counted[None, None], tau)


def on_device(route: Route) -> Route:
    tensors = (x.to(DEVICE) for x in (route.forced, route.words, route.counted))
    return Route(route.order.to(DEVICE), *tensors, route.tau)


def inputs(route: Route, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v of two batches and two heads whose blocks have means of their own."""
    plan = routed_plan(*(torch.ones(1, 1, route.order.num_tokens, 4),) * 2, route)
    q, k, v = cases.inputs(plan, 2, 2, dim)
    block = plan.block_mask.block_of(plan.block_mask.k_offsets).expand(2, 2, -1)[..., None].expand_as(k)
    q, k = (x / 2 + 0.4 * torch.randn(x.shape, generator=cases.generator(2)).gather(2, block) for x in (q, k))
    return [x.to(dtype) for x in (q, k, v)]


def literal(q: Tensor, k: Tensor, route: Route) -> tuple[Tensor, Tensor]:
    """Deviations of all pairs in float64 and whether a pair is kept, block by block; empty blocks are not."""
    bounds, blocks = route.order.offsets[0, 0].tolist(), route.order.num_blocks
    apart = torch.zeros(*q.shape[:2], blocks, blocks, dtype=torch.float64)
    kept = torch.zeros(apart.shape, dtype=torch.bool)
    full = [j for j in range(blocks) if bounds[j] < bounds[j + 1]]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            means = {j: k[b, h, bounds[j] : bounds[j + 1]].double().mean(0) for j in full}
            for i in full:
                query = q[b, h, bounds[i] : bounds[i + 1]].double().mean(0)
                scores = {j: float(query @ means[j]) for j in full}
                known = [scores[j] for j in range(blocks) if route.counted[0, 0, j]]
                for j in full:
                    apart[b, h, i, j] = (scores[j] - statistics.fmean(known)) / statistics.pstdev(known)
                    kept[b, h, i, j] = bool(route.forced[0, 0, i, j]) or float(apart[b, h, i, j]) > route.tau
    return apart, kept


def between(apart: Tensor, route: Route) -> float:
    """A limit near the route's that no deviation is near."""
    found = apart[~route.forced.expand_as(apart)].sort().values
    middle = int((found < route.tau).sum())
    near = slice(max(1, middle - 20), middle + 20)
    gaps = found.diff()[near]
    best = int(gaps.argmax()) + near.start
    return float(found[best] + found[best + 1]) / 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_deviations_are_those_of_a_loop(name: str) -> None:
    route = make_route(name, 0.5)
    q, k, _ = inputs(route, 16)
    want, kept = literal(q, k, route)
    sizes = route.order.offsets[0, 0].diff() > 0
    full = sizes[:, None] & sizes
    got = deviations(q, k, route)[..., full]
    torch.testing.assert_close(got.double(), want[..., full], rtol=1e-5, atol=1e-5)
    assert torch.equal(routed_plan(q, k, route).block_mask.kept_blocks & full, kept)


@pytest.mark.parametrize(
    ("name", "remainder"), [*((name, "mean") for name in LAYOUTS), ("ragged", "none"), ("text first", "none")]
)
def test_the_kernel_keeps_and_computes_what_the_plan_says(name: str, remainder: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    route = make_route(name, 0.5)
    q, k, v = inputs(route, 16)
    apart, _ = literal(q, k, route)
    route = replace(route, tau=between(apart, route))
    _, kept = literal(q, k, route)
    out, plan = routed_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(route), remainder)
    plan = plan.to("cpu")
    assert plan.remainder == remainder
    assert torch.equal(plan.block_mask.kept_blocks, kept)
    counts, indices = plan.block_mask.kv_counts, plan.block_mask.kv_indices
    assert torch.equal(BlockMask(counts, indices, *(route.order.offsets,) * 2).kept_blocks, kept), "the lists say else"
    assert 0 < int(kept.sum()) < kept.numel()
    sizes = route.order.offsets.diff(dim=-1).double()
    pairs = (kept * sizes[..., None] * sizes[..., None, :]).sum((-1, -2))
    assert torch.equal(plan.density, pairs / q.shape[2] ** 2)
    cases.assert_plan_as_good_as_torch((out.cpu(), None), q, k, v, plan, 0.25)


@pytest.mark.parametrize(
    ("dim", "v_dim", "dtype"),
    [(24, 24, torch.float32), (16, 40, torch.float32), (32, 32, torch.float16), (32, 32, torch.bfloat16)],
)
def test_any_channels_strides_and_dtypes(dim: int, v_dim: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    route = make_route("text", 0.5)
    q, k, v = inputs(route, dim, dtype)
    v = torch.randn(2, 2, v.shape[2], v_dim, generator=cases.generator(7)).to(dtype)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = torch.cat([k, k], -1).unflatten(-1, (2, dim)).transpose(-1, -2)[..., 0]
    apart, _ = literal(q, k, route)
    route = replace(route, tau=between(apart, route))
    _, kept = literal(q, k, route)
    out, plan = routed_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(route))
    assert torch.equal(plan.block_mask.kept_blocks.cpu(), kept)
    assert out.dtype == dtype
    cases.assert_plan_as_good_as_torch((out.cpu(), None), q, k, v, plan.to("cpu"), dim**-0.5)


def test_keys_too_far_apart_leave_nothing() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    route = make_route("even", 0.5)
    q, k, v = inputs(route, 16)
    q, k = 3 * q, k.clone()
    k[:, :, 64:80, 0] += torch.tensor([10.0, -10.0]).repeat(8)
    out, plan = routed_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(route))
    assert not plan.block_mask.kept_blocks[..., 4].all()
    cases.assert_plan_as_good_as_torch((out.cpu(), None), q, k, v, plan.to("cpu"), 0.25)


def test_what_the_kernel_cannot_do_is_said() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    route = make_route("even", 0.5)
    q, k, v = inputs(route, 16)
    check_routed_call(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), on_device(route), "mean")
    with pytest.raises(ValueError, match=r"remainder must be 'none' or 'mean', got 'value'"):
        routed_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(route), "value")
    with pytest.raises(ValueError, match=r"dtype must be .*, got torch\.float64"):
        routed_attention(*(x.double().to(DEVICE) for x in (q, k, v)), on_device(route))
    order = TokenOrder.from_index(torch.arange(160), torch.tensor([0, 150, 160]), is_identity=True)
    forced = torch.eye(2, dtype=torch.bool)[None, None]
    large = Route(order, forced, pack_words(forced), torch.ones(1, 1, 2, dtype=torch.bool), 0.5)
    with pytest.raises(ValueError, match=r"blocks must be at most \d+ tokens, .* got 150"):
        routed_attention(*(x.to(DEVICE) for x in (q, k, v)), on_device(large))


def test_without_triton_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_routing, "triton_unavailable", lambda device: "triton is missing")
    route = make_route("even", 0.5)
    with pytest.raises(ValueError, match="triton is missing"):
        routed_attention(*inputs(route, 16), route)
