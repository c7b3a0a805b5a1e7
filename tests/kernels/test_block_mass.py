"""Block masses and block means against float64 loops over blocks."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import block_mass, dense_attention, pooled_blocks, sample_rows
from tests.kernels import cases

BOUNDS = [cases.EVEN, cases.RAGGED, cases.TEXT, cases.UNEVEN]


def offsets(*bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)[None]


def by_loops(pairs: Tensor, q_bounds: list[int], k_bounds: list[int]) -> Tensor:
    rows = [
        torch.stack([pairs[..., a:b, c:d].sum((-1, -2)) for c, d in pairwise(k_bounds)], -1)
        for a, b in pairwise(q_bounds)
    ]
    return torch.stack(rows, -2)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 20])
def test_equals_a_loop_over_blocks(
    bounds: list[int], dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[block_mass.__module__], "_CHUNK_SCORES", chunk)
    plan = cases.keeping(torch.ones(1, 1, len(bounds) - 1, len(bounds) - 1, dtype=torch.bool), bounds)
    q, k, _ = cases.inputs(plan, 2, 2, 32, dtype)
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    # Any row sums will do, not only the softmax's own.
    lse = scores.logsumexp(-1) + torch.rand(scores.shape[:-1], generator=cases.generator())
    want = by_loops((scores - lse[..., None]).exp(), bounds, bounds)
    plain = (q.float() @ k.float().transpose(-1, -2) * 0.3 - lse.float()[..., None]).exp()
    got = block_mass(q, k, lse.float(), offsets(bounds), offsets(bounds), scale=0.3)
    floor = 4 * torch.finfo(torch.float32).eps * want.max()
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 2 * (by_loops(plain, bounds, bounds) - want).abs().max() + floor


def test_offsets_per_head_and_different_lengths() -> None:
    heads = [[0, 10, 50, 90], [0, 45, 45, 90]]
    draw = cases.generator()
    q, k = (torch.randn(2, 2, n, 16, generator=draw) for n in (90, 96))
    scores = q.double() @ k.double().transpose(-1, -2) * 0.3
    got = block_mass(q, k, scores.logsumexp(-1).float(), offsets(*heads), offsets(cases.EVEN), scale=0.3)
    want = torch.stack([by_loops(scores.softmax(-1)[:, h], heads[h], cases.EVEN) for h in range(2)], 1)
    assert (got - want).abs().max() <= 1e2 * torch.finfo(torch.float32).eps * want.max()


def test_rows_sum_to_the_number_of_queries() -> None:
    q, k, v = cases.inputs(cases.full_plan(91), 1, 2, 16)
    lse = dense_attention(q, k, v, return_lse=True)[1]
    mass = block_mass(q, k, lse, offsets(cases.RAGGED), offsets(cases.RAGGED), scale=16**-0.5)
    sizes = torch.tensor(cases.RAGGED).diff().float().expand(1, 2, -1)
    torch.testing.assert_close(mass.sum(-1), sizes)


def test_rows_that_kept_nothing_have_no_mass() -> None:
    q, k, _ = cases.inputs(cases.full_plan(96), 1, 1, 16)
    lse = torch.full((1, 1, 96), float("-inf"))
    assert not block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=0.3).any()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (100 * x for x in cases.inputs(cases.full_plan(96), 1, 1, 16))
    lse = dense_attention(q, k, v, scale=0.3, return_lse=True)[1]
    mass = block_mass(q, k, lse, offsets(cases.EVEN), offsets(cases.EVEN), scale=0.3)
    # Row sums near 1e5 have steps of 1/128 in float32, and the mass is as exact as they are.
    torch.testing.assert_close(mass.sum(-1), torch.full((1, 1, 6), 16.0), rtol=1 / 64, atol=0)


def test_names_what_does_not_fit() -> None:
    q = torch.zeros(1, 1, 96, 16)
    with pytest.raises(ValueError, match="q and k must agree"):
        block_mass(q, q[..., :8], q[..., 0], offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)
    with pytest.raises(ValueError, match=r"lse must be \(1, 1, 96\)"):
        block_mass(q, q, q[..., :5, 0], offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_pooled_blocks_are_means(bounds: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, bounds[-1], 8, generator=cases.generator()).to(dtype)
    got = pooled_blocks(x, offsets(bounds))
    pieces = [x.double()[:, :, a:b] for a, b in pairwise(bounds)]
    want = torch.stack([p.mean(2) if p.shape[2] else p.sum(2) for p in pieces], 2)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (got - want).abs().max() <= 8 * torch.finfo(got.dtype).eps * x.double().abs().max()


@pytest.mark.parametrize("stride", [1, 2, 3, 4, 100])
def test_sampled_rows_are_spread_over_every_block(stride: int) -> None:
    bounds = [0, 1, 3, 10, 26, 31]
    rows, got = sample_rows(torch.tensor([[bounds]], dtype=torch.int32), stride)
    found = [rows[a:b].tolist() for a, b in pairwise(got[0, 0])]
    for (start, end), taken in zip(pairwise(bounds), found, strict=True):
        assert taken == list(range(start + min(stride // 2, end - start - 1), end, stride))


@pytest.mark.parametrize("bounds", [*BOUNDS, [*range(0, 96, 8), 91]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_says_the_same(bounds: list[int], dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("on a GPU machine the interpreter is off")
    draw = cases.generator()
    k_bounds = [0, 40, 80, 96, 130]
    q, k = (torch.randn(2, 2, n, 24, generator=draw).to(dtype) for n in (bounds[-1], k_bounds[-1]))
    lse = (q.double() @ k.double().transpose(-1, -2) * 0.3).logsumexp(-1).float()
    lse[:, :, 3] = float("-inf")
    arguments = (q, k, lse, offsets(bounds), offsets(k_bounds))
    want = block_mass(*arguments, scale=0.3)
    got = block_mass(*arguments, scale=0.3, backend="triton")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_an_unknown_backend_is_refused() -> None:
    q = torch.randn(1, 1, 96, 16)
    with pytest.raises(ValueError, match="'torch' or 'triton', got 'fast'"):
        block_mass(q, q, torch.zeros(1, 1, 96), offsets(cases.EVEN), offsets(cases.EVEN), scale=1.0, backend="fast")
