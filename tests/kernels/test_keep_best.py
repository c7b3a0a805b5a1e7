"""The best blocks of every row: the kernel and the sort against each other and against a loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.kernels import keep_best
from tests.kernels.test_block_mass import needs_gpu, needs_interpreter

# Few distinct values, so that ties are common, and those at the ends of what float32 holds.
VALUES = [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38, math.inf, -math.inf]


@needs_interpreter
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_the_kernel_keeps_what_the_sort_keeps(seed: int, columns: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.tensor(VALUES)[torch.randint(len(VALUES), (2, 2, 3, columns), generator=draw)].to(dtype)
    counts = torch.randint(-1, columns + 2, (2, 1), generator=draw)
    want = keep_best(scores, counts, backend="torch")
    assert torch.equal(keep_best(scores, counts, backend="triton"), want)
    assert torch.equal(want.sum(-1), counts.clamp(1, columns)[..., None].expand(2, 2, 3))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
def test_equals_a_loop_over_rows(backend: str) -> None:
    scores = torch.randint(5, (1, 3, 4, 100), generator=torch.Generator().manual_seed(0)).float()
    # Strides of a transposed map, and a number of blocks for each head.
    scores = scores.transpose(2, 3).contiguous().transpose(2, 3)
    counts = torch.tensor([[1, 37, 100]])
    kept = keep_best(scores, counts, backend=backend)
    for head, count in enumerate([1, 37, 100]):
        for row, got in zip(scores[0, head].tolist(), kept[0, head], strict=True):
            best = sorted(range(100), key=lambda j: (-row[j], j))[:count]
            assert got.nonzero()[:, 0].tolist() == sorted(best)


@needs_interpreter
def test_nan_ranks_first_in_both() -> None:
    scores = torch.tensor([[[[1.0, math.nan, math.inf, -math.nan, 2.0]]]])
    for count in range(1, 6):
        counts = torch.tensor([[count]])
        want = keep_best(scores, counts, backend="torch")
        assert torch.equal(keep_best(scores, counts, backend="triton"), want)


def test_long_rows_are_sorted_and_refused_by_the_kernel() -> None:
    scores = torch.rand(1, 1, 1, 16385)
    assert keep_best(scores, torch.tensor([[5]])).sum() == 5
    with pytest.raises(ValueError, match="at most 16384 key blocks, got 16385"):
        keep_best(scores, torch.tensor([[5]]), backend="triton")
    with pytest.raises(ValueError, match="backend must be 'auto', 'torch' or 'triton', got 'fast'"):
        keep_best(scores, torch.tensor([[5]]), backend="fast")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("columns", [1, 100, 1182, 16384])
def test_on_a_gpu_the_kernel_keeps_what_the_sort_keeps(columns: int) -> None:
    draw = torch.Generator().manual_seed(columns)
    scores = torch.randint(50, (2, 3, 40, columns), generator=draw).float()
    counts = torch.randint(1, columns + 1, (1, 3), generator=draw)
    assert torch.equal(keep_best(scores.cuda(), counts.cuda()).cpu(), keep_best(scores, counts))
