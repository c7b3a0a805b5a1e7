"""Dense attention: row sums on every path, and plans that are not full refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.kernels import dense, dense_attention, get_backend
from tests.kernels import cases


def _everything(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [16, 40, 128])
@pytest.mark.parametrize("flash", [True, False])
def test_output_and_row_sums(dtype: torch.dtype, dim: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not flash:
        monkeypatch.setattr(dense, "has_flash_cpu", lambda dtype: False)
        monkeypatch.setattr(dense, "_CHUNK_SCORES", 1000)
    q, k, v = cases.inputs(cases.full_plan(91), 2, 2, dim, dtype)
    got = dense_attention(q, k, v, return_lse=True)
    cases.assert_as_good_as_torch(got, q, k, v, _everything(q, k), dim**-0.5)


def test_strided_views() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in cases.inputs(cases.full_plan(91), 2, 2, 40))
    got = dense_attention(q, k, v, return_lse=True)
    cases.assert_as_good_as_torch(got, q, k, v, _everything(q, k), 40**-0.5)


def test_without_row_sums_it_is_sdpa() -> None:
    q, k, v = cases.inputs(cases.full_plan(91), 1, 2, 16)
    assert torch.equal(dense_attention(q, k, v, scale=0.2), F.scaled_dot_product_attention(q, k, v, scale=0.2))


def test_row_sums_have_a_backward() -> None:
    q, k, v = (x.requires_grad_() for x in cases.inputs(cases.full_plan(91), 1, 1, 16))
    dense_attention(q, k, v, return_lse=True)[1].sum().backward()
    assert q.grad is not None
    assert q.grad.abs().sum() > 0


def test_sdpa_backend_takes_full_plans_only() -> None:
    sdpa, full, sparse = get_backend("sdpa"), cases.full_plan(96), cases.random_plan(cases.EVEN)
    q, k, v = cases.inputs(full, 1, 2, 16)
    assert sdpa.refuses(q, k, v, full) is None
    assert "does not keep every block" in str(sdpa.refuses(q, k, v, sparse))
    out, lse = sdpa.forward(q, k, v, full, scale=0.3, return_lse=True)
    cases.assert_as_good_as_torch((out, lse), q, k, v, _everything(q, k), 0.3)
    assert sdpa.forward(q, k, v, full, scale=0.3, return_lse=False)[1] is None


def test_xformers_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    xformers = get_backend("xformers")
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'dit-sparse[xformers]'" in str(xformers.unavailable(torch.device("cuda")))
    monkeypatch.setattr(dense.importlib.util, "find_spec", lambda name: object())
    assert xformers.unavailable(torch.device("cuda")) is None
    assert "CUDA" in str(xformers.unavailable(torch.device("cpu")))


def test_xformers_refuses_float64_and_sparse_plans() -> None:
    xformers, full = get_backend("xformers"), cases.full_plan(96)
    q, k, v = cases.inputs(full, 1, 2, 16)
    assert xformers.refuses(q, k, v, full) is None
    assert "float64" in str(xformers.refuses(q.double(), k, v, full))
    assert "does not keep every block" in str(xformers.refuses(q, k, v, cases.random_plan(cases.EVEN)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("tokens", [4608, 300])
def test_on_a_gpu_the_fastest_kernel_is_right(tokens: int) -> None:
    q, k, v = (torch.randn(1, tokens, 4, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    out, lse = dense_attention(q, k, v, return_lse=True)
    plain, sums = dense._plain_with_lse(q.double(), k.double(), v.double(), 128**-0.5)
    low = F.scaled_dot_product_attention(q, k, v)
    assert (out - plain).norm() <= 2 * (low - plain).norm()
    assert (lse - sums).abs().max() < 2e-2
    assert (dense_attention(q, k, v) - plain).norm() <= 2 * (low - plain).norm()
