"""FlashAttention-3 as a dense backend: what is passed to it, what it refuses, how one gets it."""

from __future__ import annotations

import pytest
import torch

from dit_sparse.kernels import BackendUnavailableError, dense, dense_attention, flash_attention_3, get_backend, select
from dit_sparse.kernels.flash_attention_3 import positive_scale
from tests.kernels import cases, fakes

FA3 = get_backend("fa3")
CUDA = torch.device("cuda")
MISSING = FA3.unavailable(CUDA) if torch.cuda.is_available() else "no NVIDIA GPU"


def _everything(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.ones(1, 1, q.shape[2], k.shape[2], dtype=torch.bool)


@pytest.mark.parametrize("scale", [0.2, -0.2, 0.0])
@pytest.mark.parametrize("return_lse", [True, False])
def test_passes_layout_and_scale(scale: float, return_lse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install_fa3(monkeypatch)
    plan = cases.full_plan(91)
    q, k, v = cases.inputs(plan, 2, 3, 40, torch.bfloat16)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    assert FA3.refuses(q, k, v, plan) is None
    out, lse = FA3.forward(q, k, v, plan, scale=scale, return_lse=return_lse)
    assert (lse is not None) == return_lse
    assert out.shape == q.shape
    cases.assert_as_good_as_torch((out, lse), q, k, v, _everything(q, k), scale)


def test_refuses_what_the_wheel_is_not_built_for() -> None:
    plan = cases.full_plan(96)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    assert FA3.refuses(q, k, v, plan) is None
    assert "bfloat16, the only one" in str(FA3.refuses(q.half(), k.half(), v.half(), plan))
    assert "one multiple of 8 up to 256" in str(FA3.refuses(q[..., :12], k[..., :12], v[..., :12], plan))
    assert "got 16 and 8" in str(FA3.refuses(q, k, v[..., :8], plan))
    wide = torch.zeros(1, 1, 96, 264, dtype=torch.bfloat16)
    assert "got 264 and 264" in str(FA3.refuses(wide, wide, wide, plan))
    assert "does not keep every block" in str(FA3.refuses(q, k, v, cases.random_plan(cases.EVEN)))
    assert "no backward" in str(FA3.refuses(q.requires_grad_(), k, v, plan))


def test_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attention_3.importlib.util, "find_spec", lambda name: None)
    plan = cases.full_plan(96)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'dit-sparse\[fa3\]'"):
        select("fa3", q, k, v, plan)
    monkeypatch.setattr(flash_attention_3.importlib.util, "find_spec", lambda name: object())
    assert "CUDA only" in str(FA3.unavailable(torch.device("cpu")))
    for capability, ready in (((9, 0), True), ((8, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, got=capability: got)
        assert (FA3.unavailable(CUDA) is None) == ready
    assert "this GPU has 10.0" in str(FA3.unavailable(CUDA))


def test_a_scale_is_made_positive_without_changing_the_scores() -> None:
    q = torch.randn(1, 1, 4, 8, generator=cases.generator())
    for scale in (0.3, -0.3, 0.0):
        moved, positive = positive_scale(q, scale)
        assert positive > 0
        assert torch.equal(moved * positive, q * scale)


def test_row_sums_prefer_the_fastest_operator_that_takes_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.full_plan(32)
    q, k, v = cases.inputs(plan, 1, 1, 16, torch.bfloat16)
    monkeypatch.setattr(dense, "fa3_attention", lambda q, k, v, scale: "fa3")
    monkeypatch.setattr(dense, "_cudnn_with_lse", lambda q, k, v, scale: "cudnn")
    monkeypatch.setattr(dense, "_plain_with_lse", lambda q, k, v, scale: "plain")
    monkeypatch.setattr(dense, "fa3_unavailable", lambda device: None)
    monkeypatch.setattr(dense, "_cudnn_takes", lambda q, k, v: True)
    assert dense._on_hopper(q, k, v, 0.3, True) == "fa3"
    monkeypatch.setattr(dense.HopperBackend, "forward", lambda *_, **__: "hopper")
    assert dense._on_hopper(q.half(), k.half(), v.half(), 0.3, True) is None
    monkeypatch.setattr(dense.HopperBackend, "unavailable", lambda self, device: None)
    assert dense._on_hopper(q.half(), k.half(), v.half(), 0.3, True) == "hopper"
    assert dense._on_hopper(q.float(), k.float(), v.float(), 0.3, True) is None
    monkeypatch.setattr(dense, "fa3_unavailable", lambda device: "not here")
    assert dense._on_hopper(q, k, v, 0.3, True) == "hopper"
    assert dense._cuda_with_lse(q, k, v, 0.3) == "cudnn"
    monkeypatch.setattr(dense, "_cudnn_takes", lambda q, k, v: False)
    assert dense._cuda_with_lse(q.float(), k.float(), v.float(), 0.3) == "plain"


def test_cudnn_row_sums_have_one_value_a_row() -> None:
    q, k, v = (torch.empty(2, 3, n, 64, dtype=torch.bfloat16, device="meta") for n in (40, 56, 56))
    out, lse = dense._cudnn_with_lse(q, k, v, 0.3)
    assert out.shape == q.shape
    assert lse.shape == q.shape[:-1]
    assert lse.dtype == torch.float32


def test_cudnn_is_not_asked_for_what_torch_keeps_from_it() -> None:
    q, k, v = cases.inputs(cases.full_plan(32), 1, 1, 16)
    assert not dense._cudnn_takes(q, k, v)


@pytest.mark.gpu
@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
@pytest.mark.parametrize("dim", [64, 128])
def test_on_a_gpu(dim: int) -> None:
    plan = cases.full_plan(1000, 128)
    q, k, v = cases.inputs(plan, 2, 3, dim, torch.bfloat16)
    on_gpu = (q.cuda(), k.cuda(), v.cuda())
    out, lse = FA3.forward(*on_gpu, plan.to("cuda"), scale=0.1, return_lse=True)
    assert lse is not None
    cases.assert_as_good_as_torch((out.cpu(), lse.cpu()), q, k, v, _everything(q, k), 0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keys", [1000, 257])
def test_cudnn_row_sums_on_a_gpu(dtype: torch.dtype, dim: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "fa3_unavailable", lambda device: "not wanted here")
    draw = cases.generator(dim)
    q, k, v = (torch.randn(2, 3, n, dim, generator=draw).to(dtype) for n in (513, keys, keys))
    on_gpu = (q.cuda(), k.cuda(), v.cuda())
    if not dense._cudnn_takes(*on_gpu):
        pytest.skip("torch keeps this call from cuDNN here")
    out, lse = dense_attention(*on_gpu, scale=0.1, return_lse=True)
    cases.assert_as_good_as_torch((out.cpu(), lse.cpu()), q, k, v, _everything(q, k), 0.1)
