"""Index lists of bool rows: the kernel and the sort against each other and against a loop."""

import pytest
import torch

from dit_sparse.compact import compact, compact_by_sort, compact_by_triton
from tests.kernels.test_block_mass import needs_interpreter

SHAPES = [(1, 1, 1, 1), (2, 3, 4, 37), (1, 2, 5, 64), (1, 1, 2, 3000), (1, 1, 0, 5), (1, 2, 3, 0), (7,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("way", [compact_by_sort, pytest.param(compact_by_triton, marks=needs_interpreter)])
def test_lists_the_kept_entries_and_then_the_others(shape, density, way):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    counts, indices = way(kept)
    assert (counts.dtype, indices.dtype) == (torch.int32, torch.int32)
    assert counts.shape == shape[:-1]
    assert indices.shape == shape
    assert counts.is_contiguous()
    assert indices.is_contiguous()
    flat = kept.reshape(-1, shape[-1]) if kept.numel() else []
    for row, count, got in zip(flat, counts.flatten(), indices.reshape(-1, max(1, shape[-1])), strict=False):
        want = [j for j, keep in enumerate(row) if keep]
        assert count == len(want)
        assert got.tolist() == want + [j for j, keep in enumerate(row) if not keep]


@needs_interpreter
def test_rows_may_have_any_strides():
    kept = torch.rand(2, 3, 20, 9, generator=torch.Generator().manual_seed(0)) < 0.4
    kept = kept.transpose(2, 3).expand(2, 3, 9, 20)
    for got, want in zip(compact_by_triton(kept), compact_by_sort(kept), strict=True):
        assert torch.equal(got, want)


def test_on_the_cpu_the_sort_runs():
    kept = torch.rand(1, 1, 3, 8) < 0.5
    for got, want in zip(compact(kept), compact_by_sort(kept), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("columns", [1, 63, 1182, 5000])
def test_on_a_gpu_the_kernel_says_the_same(columns):
    kept = torch.rand(2, 3, 50, columns, device="cuda") < 0.3
    for got, want in zip(compact(kept), compact_by_sort(kept), strict=True):
        assert torch.equal(got, want)
