"""Layer norm with modulation, gated residuals: torch against diffusers' formula, the kernels against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels import add_gated, gelu_tanh_, layer_norm
from dit_sparse.kernels.modulate import (
    add_gated_by_torch,
    add_gated_by_triton,
    layer_norm_by_torch,
    layer_norm_by_triton,
)
from tests.kernels.test_block_mass import needs_interpreter

BATCH, TOKENS, CHANNELS = 2, 5, 37
OPTIONS = [(False, False), (True, False), (False, True), (True, True)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(affine: bool, modulated: bool, dtype: torch.dtype, batch: int = BATCH) -> list[Tensor | None]:
    """x with a mean far from 0, and the parameters of `layer_norm`."""
    x = (draw(BATCH, TOKENS, CHANNELS) * 3 + 20).to(dtype)
    weight, bias = (draw(CHANNELS, seed=s).to(dtype) if affine else None for s in (1, 2))
    scale, shift = (draw(batch, 1, CHANNELS, seed=s) if modulated else None for s in (3, 4))
    return [x, weight, bias, 1e-6, scale, shift]


def exact(x, weight, bias, eps, scale, shift) -> Tensor:
    """In float64, token by token."""
    out = torch.empty(x.shape, dtype=torch.float64)
    for b in range(x.shape[0]):
        for n in range(x.shape[1]):
            row = x[b, n].double()
            row = (row - row.mean()) / ((row - row.mean()).square().mean() + eps).sqrt()
            row = row if weight is None else row * weight.double() + bias.double()
            if scale is not None:
                at = b % scale.shape[0]
                row = row * (1 + scale[at, 0].double()) + shift[at, 0].double()
            out[b, n] = row
    return out


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("affine", "modulated"), OPTIONS)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_norm_kernel_equals_float64(affine, modulated, dtype, batch) -> None:
    arguments = problem(affine, modulated, dtype, batch)
    got, want = layer_norm_by_triton(*arguments), exact(*arguments)
    assert got.dtype == dtype
    assert relative(got, want) <= 2 * relative(layer_norm_by_torch(*arguments), want) + 1e-6


@needs_interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_residual_kernel_equals_float64(dtype, batch) -> None:
    x, y = (draw(BATCH, TOKENS, CHANNELS, seed=s).to(dtype) for s in (0, 1))
    gate = draw(batch, 1, CHANNELS, seed=2)
    got, want = add_gated_by_triton(x, y, gate), x.double() + y.double() * gate.double()
    assert got.dtype == dtype
    assert relative(got, want) <= 2 * relative(add_gated_by_torch(x, y, gate), want) + 1e-7


@needs_interpreter
def test_kernels_take_strided_tokens() -> None:
    x = draw(BATCH, 2 * TOKENS, CHANNELS)[:, ::2]
    y = draw(TOKENS, BATCH, CHANNELS, seed=1).transpose(0, 1)
    gate = draw(BATCH, 1, CHANNELS, seed=2)
    assert not x.is_contiguous()
    assert relative(add_gated_by_triton(x, y, gate), x.double() + y.double() * gate.double()) < 1e-6
    assert relative(layer_norm_by_triton(x, None, None, 1e-6), exact(x, None, None, 1e-6, None, None)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("affine", "modulated"), OPTIONS)
def test_torchs_path_is_diffusers_formula_bit_for_bit(affine, modulated, dtype) -> None:
    x, weight, bias, eps, scale, shift = problem(affine, modulated, dtype)
    parameters = (None, None) if weight is None else (weight.float(), bias.float())
    want = F.layer_norm(x.float(), (CHANNELS,), *parameters, eps)
    want = (want * (1 + scale) + shift if modulated else want).type_as(x)
    assert torch.equal(layer_norm(x, weight, bias, eps, scale, shift), want)
    gate = draw(BATCH, 1, CHANNELS, seed=5)
    assert torch.equal(add_gated(x, want, gate), (x.float() + want * gate).type_as(x))


def test_half_a_pair_is_refused() -> None:
    x, weight, bias, eps, scale, shift = problem(True, True, torch.float32)
    for half in ((weight, None, eps), (None, None, eps, scale), (None, bias, eps), (None, None, eps, None, shift)):
        with pytest.raises(ValueError, match="must both be given or both be None"):
            layer_norm(x, *half)


def test_gradients_pass_through() -> None:
    x, _, _, eps, scale, shift = problem(False, True, torch.float32)
    x.requires_grad_()
    add_gated(x, layer_norm(x, None, None, eps, scale, shift), scale).square().sum().backward()
    assert x.grad.norm() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("affine", "modulated"), OPTIONS)
def test_on_a_gpu_the_kernels_equal_torch(affine, modulated) -> None:
    x = (torch.randn(2, 1003, 5120, device="cuda") * 3 + 5).bfloat16()
    weight, bias = (torch.randn(5120, device="cuda").bfloat16() if affine else None for _ in range(2))
    scale, shift = (torch.randn(2, 1, 5120, device="cuda") if modulated else None for _ in range(2))
    gate = torch.randn(2, 1, 5120, device="cuda")
    with torch.no_grad():
        got, low = (f(x, weight, bias, 1e-6, scale, shift) for f in (layer_norm, layer_norm_by_torch))
        want = F.layer_norm(x.double(), (5120,), *(None if t is None else t.double() for t in (weight, bias)), 1e-6)
        want = want * (1 + scale.double()) + shift.double() if modulated else want
        assert relative(got, want) <= 2 * relative(low, want)
        assert relative(add_gated(x, got, gate), x.double() + got.double() * gate.double()) <= 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_errs_no_more_than_torchs(dtype) -> None:
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([0.0, -60.0, 60.0])]).to(dtype)
    exact, torchs = F.gelu(x.double(), approximate="tanh"), F.gelu(x, approximate="tanh")
    given = x.clone()
    assert gelu_tanh_(given) is given
    floor = 2 * torch.finfo(dtype).eps * exact.abs()
    # Torch computes in float32 whatever the dtype; this rounds every step.
    steps = 1 if dtype == torch.float32 else 8
    assert ((given - exact).abs() <= steps * (2 * (torchs - exact).abs() + floor + torch.finfo(dtype).eps)).all()
