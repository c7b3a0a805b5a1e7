"""Antidiagonal scores against float64 loops over pairs of groups."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse.kernels import antidiagonal_scores, block_mass
from dit_sparse.types import BlockGeometry
from tests.kernels import cases
from tests.kernels.test_block_mass import BOUNDS, needs_gpu, needs_interpreter, offsets


def groups(bounds: list[int], stride: int) -> list[tuple[int, list[int]]]:
    """(block, tokens) of every group."""
    return [
        (block, list(range(first, min(first + stride, end))))
        for block, (start, end) in enumerate(pairwise(bounds))
        for first in range(start, end, stride)
    ]


def by_loops(q: Tensor, k: Tensor, q_bounds: list[int], k_bounds: list[int], stride: int, scale: float) -> Tensor:
    """`[Mq, Mk]` for `q`, `k` `[N, D]`: token by token along one antidiagonal of each pair of groups."""
    pairs = q.double() @ k.double().T
    q_groups, k_groups = groups(q_bounds, stride), groups(k_bounds, stride)
    products = torch.zeros(len(q_groups), len(k_groups), dtype=torch.float64)
    for a, (_, rows) in enumerate(q_groups):
        for b, (_, columns) in enumerate(k_groups):
            for s, column in enumerate(columns):
                if stride - 1 - s < len(rows):
                    products[a, b] += pairs[rows[stride - 1 - s], column]
    shares = (products * scale / stride).softmax(-1)
    want = torch.zeros(len(q_bounds) - 1, len(k_bounds) - 1, dtype=torch.float64)
    for a, (q_block, _) in enumerate(q_groups):
        for b, (k_block, _) in enumerate(k_groups):
            want[q_block, k_block] += shares[a, b]
    return want


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_equals_a_loop_over_groups(bounds: list[int], stride: int, backend: str) -> None:
    draw = cases.generator()
    k_bounds = [0, 16, 32, 48, 51]
    q, k = (torch.randn(1, 1, n, 24, generator=draw) for n in (bounds[-1], k_bounds[-1]))
    got = antidiagonal_scores(q, k, offsets(bounds), offsets(k_bounds), stride=stride, scale=0.7, backend=backend)
    want = by_loops(q[0, 0], k[0, 0], bounds, k_bounds, stride, 0.7)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[0, 0].double(), want, rtol=1e-5, atol=1e-5)
    rows = torch.tensor([-(-(end - start) // stride) for start, end in pairwise(bounds)])
    torch.testing.assert_close(got[0, 0].sum(-1), rows.float())


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_takes_batches_views_and_offsets_per_head(dtype: torch.dtype) -> None:
    draw = cases.generator()
    q_offsets = torch.tensor([[0, 10, 50, 90], [0, 45, 45, 90]], dtype=torch.int32)[None]
    # Views as the pipelines give them: `[B, N, H, D]` in memory.
    q, k = (torch.randn(2, n, 2, 16, generator=draw).to(dtype).transpose(1, 2) for n in (90, 96))
    arguments = (q, k, q_offsets, offsets(cases.EVEN))
    want = antidiagonal_scores(*arguments, stride=4, backend="torch")
    sizes = {"q_blocks": BlockGeometry.of(q_offsets), "k_blocks": BlockGeometry(16, 0, 6)}
    got = antidiagonal_scores(*arguments, stride=4, backend="triton", **sizes)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_stride_one_is_the_block_mass() -> None:
    q, k, _ = cases.inputs(cases.full_plan(91), 2, 2, 16)
    bounds = offsets(cases.RAGGED)
    lse = (q @ k.transpose(-1, -2) * 0.25).logsumexp(-1)
    want = block_mass(q, k, lse, bounds, bounds, scale=0.25)
    torch.testing.assert_close(antidiagonal_scores(q, k, bounds, bounds, stride=1), want, rtol=1e-5, atol=1e-5)


def test_names_what_does_not_fit() -> None:
    q = torch.zeros(1, 1, 96, 16)
    bounds = offsets(cases.EVEN)
    with pytest.raises(ValueError, match="q and k must agree"):
        antidiagonal_scores(q, q[..., :8], bounds, bounds)
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        antidiagonal_scores(q, q, bounds, bounds, stride=0)
    with pytest.raises(ValueError, match="k_offsets must rise from 0 to the 96 tokens"):
        antidiagonal_scores(q, q, bounds, offsets(cases.RAGGED))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block", [64, 100, 128, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 72, 128, 256])
def test_on_a_gpu_triton_says_the_same(block: int, dtype: torch.dtype, dim: int) -> None:
    q, k = (torch.randn(2, 3000, 3, dim, device="cuda").to(dtype).transpose(1, 2) for _ in range(2))
    cut = offsets([*range(0, 3000, block), 3000]).cuda()
    want = antidiagonal_scores(q.cpu(), k.cpu(), cut.cpu(), cut.cpu())
    torch.testing.assert_close(antidiagonal_scores(q, k, cut, cut).cpu(), want, rtol=1e-3, atol=1e-3)
