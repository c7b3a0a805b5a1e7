"""RMS norm with rotary embedding: torch's path against diffusers bit for bit, the kernel against float64."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_sparse.kernels import norm_rope
from dit_sparse.kernels.norm_rope import norm_rope_by_torch, norm_rope_by_triton, rotate
from tests.kernels.test_block_mass import needs_interpreter

TOKENS, HEADS, DIM = 11, 3, 20


def problem(dtype: torch.dtype, per_head: bool, batch: int = 2, device: str = "cpu") -> tuple[Tensor, ...]:
    """Projections, a norm's weight and rotary tables."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(batch, TOKENS, HEADS, DIM, generator=g).mul(3)
    weight = torch.randn(DIM if per_head else HEADS * DIM, generator=g)
    angles = torch.randn(1, TOKENS, 1, DIM // 2, generator=g).repeat_interleave(2, -1)
    return x.to(device, dtype), weight.to(device, dtype), angles.cos().to(device), angles.sin().to(device)


def exact(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """In float64, token by token and head by head."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for b, n, h in torch.cartesian_prod(*(torch.arange(size) for size in x.shape[:3])).tolist():
        row = x[b, n, h].double()
        per_head = weight.numel() == x.shape[-1]
        mean = (row if per_head else x[b, n].double()).square().mean()
        row = row / (mean + eps).sqrt() * (weight if per_head else weight.view(HEADS, DIM)[h]).double()
        if cos is not None:
            for i in range(0, DIM, 2):
                c, s = cos[0, n, 0, i].double(), sin[0, n, 0, i + 1].double()
                row[i : i + 2] = torch.stack([row[i] * c - row[i + 1] * s, row[i] * s + row[i + 1] * c])
        out[b, n, h] = row
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@needs_interpreter
def test_the_kernel_equals_float64(dtype, per_head, rotated) -> None:
    x, weight, cos, sin = problem(dtype, per_head)
    tables = (cos, sin) if rotated else (None, None)
    got, want = norm_rope_by_triton(x, weight, 1e-6, *tables), exact(x, weight, 1e-6, *tables)
    assert got.dtype == dtype
    assert relative(got, want) <= 2 * relative(norm_rope_by_torch(x, weight, 1e-6, *tables), want) + 1e-7


@needs_interpreter
def test_the_kernel_takes_strided_projections_and_the_epsilon() -> None:
    x, weight, cos, sin = problem(torch.float32, per_head=False)
    fused = torch.cat([x, x + 1, x], dim=2)  # as of one projection for query, key and value
    strided = fused[:, :, HEADS : 2 * HEADS]
    assert not strided.is_contiguous()
    got = norm_rope_by_triton(strided, weight, 3.0, cos, sin)
    assert relative(got, exact(x + 1, weight, 3.0, cos, sin)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_path_is_diffusers_bit_for_bit(dtype) -> None:
    x, weight, cos, sin = problem(dtype, per_head=True)
    norm = torch.nn.RMSNorm(DIM, eps=1e-6, dtype=dtype)
    norm.weight.data = weight
    want = apply_rotary_emb(norm(x), (cos[0, :, 0], sin[0, :, 0]), sequence_dim=1)
    with torch.no_grad():
        assert torch.equal(norm_rope(x, weight, 1e-6, cos[0, :, 0], sin[0, :, 0]), want)


@pytest.mark.parametrize("shape", [(1, 3, 16), (17, 1, 32), (33, 3, 48), (9, 4, 64), (5, 2, 128), (6, 2, 24)], ids=str)
@pytest.mark.parametrize("start", [0, 1, 4])
def test_turning_is_diffusers_bit_for_bit_however_it_is_computed(shape, start) -> None:
    tokens, heads, dim = shape
    g = torch.Generator().manual_seed(0)
    angles = torch.randn(tokens, dim // 2, generator=g).repeat_interleave(2, -1) * 100
    fused = torch.randn(2, tokens, 3 * heads * dim + start, generator=g)
    x = fused[..., start : start + heads * dim].unflatten(2, (heads, dim))  # as of one projection
    want = apply_rotary_emb(x, (angles.cos(), angles.sin()), sequence_dim=1)
    assert torch.equal(rotate(x, angles.cos(), angles.sin()), want)


def test_gradients_pass_through() -> None:
    x, weight, cos, sin = problem(torch.float32, per_head=False)
    x.requires_grad_()
    norm_rope(x, weight, 1e-6, cos, sin).square().sum().backward()
    assert x.grad.norm() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("per_head", [True, False])
def test_on_a_gpu_the_kernel_equals_torch(per_head) -> None:
    x = torch.randn(2, 1003, 40, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(128 if per_head else 40 * 128, device="cuda", dtype=torch.bfloat16)
    angles = torch.randn(1, 1003, 1, 64, device="cuda").repeat_interleave(2, -1)
    with torch.no_grad():
        got = norm_rope(x, weight, 1e-6, angles.cos(), angles.sin())
        want = norm_rope_by_torch(x.double(), weight.double(), 1e-6, angles.cos().double(), angles.sin().double())
        low = norm_rope_by_torch(x, weight, 1e-6, angles.cos(), angles.sin())
    assert relative(got, want) <= 2 * relative(low, want)
