"""The error that each block left to its mean would make in the output, against loops in float64."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import attend_rows, output_errors, scattered_rows
from dit_sparse.types import AttentionPlan, TokenOrder
from tests.kernels import cases
from tests.kernels.test_block_mass import needs_gpu, needs_interpreter

BOUNDS = [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN]


def order_of(bounds: list[int]) -> TokenOrder:
    return TokenOrder.from_index(torch.arange(bounds[-1]), torch.tensor(bounds))


def by_loops(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], rows: Tensor, scale: float) -> Tensor:
    """Errors of one head, `q, k, v` `[N, D]`, in their dtype; `rows` are the queries of each block."""
    errors = torch.zeros(len(bounds) - 1, len(bounds) - 1, dtype=q.dtype)
    for i, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        squares = q[first:last].square().mean(0)
        for row in rows[i].tolist():
            scores = scale * (k @ q[row])
            weights = scores.softmax(0)
            out = weights @ v
            for j, (c, d) in enumerate(pairwise(bounds)):
                if c == d:
                    continue
                spread = float(scale**2 / 2 * squares @ k[c:d].var(0, correction=0))
                a = (d - c) * (scale * (k[c:d].mean(0) @ q[row]) - scores.logsumexp(0)).exp() if spread <= 2 else 0.0
                change = weights[c:d] @ (v[c:d] - out) - a * (v[c:d].mean(0) - out)
                errors[i, j] += change.square().sum() * (last - first) / rows.shape[1]
    return errors


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_equals_a_loop_over_queries_and_blocks(
    bounds: list[int], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernel does not take float64")
    module = sys.modules[output_errors.__module__]
    monkeypatch.setattr(module, "_CHUNK_SCORES", 300)
    monkeypatch.setattr(module, "_SPAN", 4)
    q, k, v = (x[0, 0] for x in cases.inputs(cases.full_plan(bounds[-1]), 1, 1, 24, dtype))
    order = order_of(bounds)
    rows = scattered_rows(order.offsets, 3)
    want = by_loops(q.double(), k.double(), v.double(), bounds, rows, 0.3)
    assert (want > 0).any()
    plain = by_loops(q.float(), k.float(), v.float(), bounds, rows, 0.3).double()
    found = output_errors(*(x[None, None] for x in (q, k, v)), order, order, rows=3, scale=0.3, backend=backend)[0, 0]
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # The output that the errors are taken from has the dtype of q.
    eps = torch.finfo(dtype).eps
    rows_error = want.amax(-1, keepdim=True)
    assert ((found - want).abs() <= 2 * (plain - want).abs() + 16 * eps * rows_error).all()


def test_batches_and_heads_are_apart() -> None:
    q, k, v = torch.randn(3, 2, 2, 90, 16, generator=cases.generator(), dtype=torch.float64)
    bounds = [0, 10, 50, 90]
    order = order_of(bounds)
    found = output_errors(q, k, v, order, order, rows=2)
    rows = scattered_rows(order.offsets, 2)
    for b in range(2):
        for h in range(2):
            torch.testing.assert_close(found[b, h], by_loops(q[b, h], k[b, h], v[b, h], bounds, rows, 0.25))


def test_with_every_query_it_is_the_change_of_the_output() -> None:
    """One block of small weight left to its mean: the output moves by as much as was said, to first order."""
    q, k, v = torch.randn(3, 1, 1, 256, 16, generator=cases.generator(), dtype=torch.float64)
    order = order_of(list(range(0, 257, 16)))
    said = output_errors(q, k, v, order, order, rows=16)[0, 0]
    dense = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    from dit_sparse import sparse_attention

    for i, j in [(0, 3), (5, 5), (15, 0)]:
        kept = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        kept[0, 0, i, j] = False
        out = sparse_attention(q, k, v, AttentionPlan.from_kept(order, kept, remainder="mean"), backend="reference")
        assert float((out - dense).square().sum()) == pytest.approx(float(said[i, j]), rel=0.15)


def test_the_size_of_the_output_is_told_by_the_same_rows() -> None:
    q, k, v = torch.randn(3, 2, 2, 64, 16, generator=cases.generator())
    order = order_of([0, 16, 32, 48, 64])
    dense = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
    whole = attend_rows(q, k, v, order, 16)
    torch.testing.assert_close(whole.squares(order), dense.square().sum(-1).unflatten(2, (4, 16)).sum(-1))
    uneven = order_of([0, 10, 10, 64])
    some = attend_rows(q, k, v, uneven, 3)
    own = dense[:, :, scattered_rows(uneven.offsets, 3)].square().sum(-1).mean(-1)
    torch.testing.assert_close(some.squares(uneven), own * torch.tensor([10, 0, 54]))
    found = output_errors(q, k, v, uneven, uneven, rows=3, probes=some)
    assert torch.equal(found, output_errors(q, k, v, uneven, uneven, rows=3))


def test_rows_of_a_tile_are_of_every_row_and_column() -> None:
    rows = scattered_rows(torch.arange(0, 257, 64, dtype=torch.int32)[None, None], 8)
    assert rows.shape == (4, 8)
    for block, own in enumerate(rows.tolist()):
        assert sorted(row // 8 for row in own) == list(range(8 * block, 8 * block + 8))
        assert sorted(row % 8 for row in own) == list(range(8))


@pytest.mark.parametrize("rows", range(1, 13))
def test_rows_stay_within_their_blocks(rows: int) -> None:
    bounds = [0, 1, 1, 6, 40, 104]
    found = scattered_rows(torch.tensor(bounds, dtype=torch.int32)[None, None], rows).tolist()
    for own, (first, last) in zip(found, pairwise(bounds), strict=True):
        if first < last:
            assert all(first <= row < last for row in own)
            assert len(set(own)) == min(rows, last - first) or last - first < rows * 2
    assert len(set(found[-1])) == rows


def test_names_what_does_not_fit() -> None:
    q, order = torch.zeros(1, 1, 96, 16), order_of(cases.EVEN)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        output_errors(q, q, q, order, order, rows=0)
    with pytest.raises(ValueError, match="q, k, v must agree"):
        output_errors(q, q, q[:, :, :5], order, order)
    with pytest.raises(ValueError, match="backend must be"):
        output_errors(q, q, q, order, order, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share them"):
        scattered_rows(torch.zeros(1, 2, 4, dtype=torch.int32), 8)


def pairs_of(bounds: list[int]) -> list[int]:
    """Bounds of blocks of two blocks each."""
    return [*bounds[:-1:2], bounds[-1]]


@needs_interpreter
@pytest.mark.parametrize(("rows", "dim", "dtype"), [(1, 64, torch.float16), (16, 128, torch.bfloat16), (40, 16, None)])
def test_the_kernel_takes_any_rows_of_query_blocks_of_their_own(rows: int, dim: int, dtype: torch.dtype | None) -> None:
    q, k, v = cases.inputs(cases.full_plan(97), 1, 2, dim, dtype or torch.float32)
    k = k * torch.linspace(0.2, 1.6, 97)[:, None].to(k.dtype)  # some blocks spread too far for a mean
    q_order, kv_order = order_of(pairs_of(cases.TEXT)), order_of(cases.TEXT)
    given = {"rows": rows, "scale": 2 * dim**-0.5}
    want = output_errors(q.double(), k.double(), v.double(), q_order, kv_order, **given, backend="torch")
    found = output_errors(q, k, v, q_order, kv_order, **given, backend="triton")
    assert found.shape == (1, 2, 2, 4)
    eps = torch.finfo(q.dtype).eps
    assert ((found - want).abs() <= 32 * eps * want.amax(-1, keepdim=True)).all()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("bounds", [*BOUNDS, list(range(0, 4097, 64))], ids=lambda b: f"{len(b)} bounds")
@pytest.mark.parametrize("dim", [64, 128, 80])
@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("backend", ["auto", "triton"])  # the former is the Hopper kernel where there is one
def test_on_a_gpu_the_kernels_agree_with_torch(bounds: list[int], dim: int, rows: int, backend: str) -> None:
    q_order, kv_order = (order_of(b).to("cuda") for b in (pairs_of(bounds), bounds))
    q, k, v = torch.randn(3, 2, 3, bounds[-1], dim, device="cuda", dtype=torch.bfloat16)
    want = output_errors(q.double(), k.double(), v.double(), q_order, kv_order, rows=rows, backend="torch")
    found = output_errors(q, k, v, q_order, kv_order, rows=rows, backend=backend).double()
    assert ((found - want).abs() <= 0.05 * want.amax(-1, keepdim=True)).all()
