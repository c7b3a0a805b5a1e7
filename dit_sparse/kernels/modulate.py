"""Layer norm with modulation, and gated residuals: on a GPU one pass over the tokens instead of five.

Plain torch writes every intermediate result between the matrix products of a block to memory, in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.triton_launch import broadcast_strides, on_device_of, rows_of, takes_kernel

__all__ = ["add_gated", "gelu_tanh_", "layer_norm"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LARGEST = 16384  # channels that one program holds
_GELU = math.sqrt(2 / math.pi)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """(norm(x) * weight + bias) * (1 + scale) + shift, computed in float32.

    On a CPU, under a compiler, or where gradients are wanted this is plain torch, as diffusers computes it, bit for
    bit; on a GPU one kernel, equal up to rounding.

    Args:
        x: `[B, N, C]`.
        weight, bias: `[C]` of the norm; both or neither.
        eps: added to the variance.
        scale, shift: `[B, 1, C]` of the modulation; both or neither.

    Returns:
        `[B, N, C]` in `x`'s dtype.

    Raises:
        ValueError: one of `weight` and `bias`, or of `scale` and `shift`, without the other.

    Source: DiT (arXiv 2212.09748), section 3.2, "adaptive layer norm".
    """
    _check_pairs(weight_bias=(weight, bias), scale_shift=(scale, shift))
    if _takes(x, weight, bias, scale, shift):
        return layer_norm_by_triton(x, weight, bias, eps, scale, shift)
    return layer_norm_by_torch(x, weight, bias, eps, scale, shift)


def add_gated(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + y * gate, computed in float32; by one kernel where `layer_norm` is.

    Args:
        x, y: `[B, N, C]`.
        gate: `[B, 1, C]`.

    Returns:
        `[B, N, C]` in `x`'s dtype.
    """
    if _takes(x, y, gate):
        return add_gated_by_triton(x, y, gate)
    return add_gated_by_torch(x, y, gate)


def gelu_tanh_(x: Tensor) -> Tensor:
    """GELU by tanh (arXiv 1606.08415, section 2), in place: x sigmoid(2 u), on a CPU faster than x (1 + tanh(u)) / 2.

    Args:
        x: of any shape, overwritten; gradients are not wanted.
    """
    u = x * x
    u.mul_(2 * _GELU * 0.044715).add_(2 * _GELU).mul_(x).sigmoid_()
    return x.mul_(u)


def layer_norm_by_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`layer_norm` in plain torch, anywhere; the oracle of the kernel."""
    weight, bias = (None if t is None else t.float() for t in (weight, bias))
    normed = F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps)
    return (normed if scale is None or shift is None else normed * (1 + scale) + shift).type_as(x)


def add_gated_by_torch(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`add_gated` in plain torch, anywhere; the oracle of the kernel."""
    return (x.float() + y.float() * gate).type_as(x)


def layer_norm_by_triton(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """`layer_norm` by the Triton kernel, on NVIDIA GPUs or under Triton's interpreter."""
    import triton

    from dit_sparse.kernels.modulate_kernel import layer_norm_kernel

    x, out = rows_of(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, tokens, channels = x.shape
    affine, modulated = weight is not None and bias is not None, scale is not None and shift is not None
    # `x` stands in for what is not there; the kernel does not read it.
    parameters = [t.contiguous() if affine and t is not None else x for t in (weight, bias)]
    parameters += [
        t.reshape(-1, 1, channels).contiguous() if modulated and t is not None else x for t in (scale, shift)
    ]
    with on_device_of(x):
        layer_norm_kernel[tokens, batch](
            x, out, *parameters, *x.stride()[:2], *out.stride()[:2], broadcast_strides(parameters[2])[0], channels, eps,
            BLOCK=triton.next_power_of_2(channels), AFFINE=affine, MODULATED=modulated, num_warps=8,
        )  # fmt: skip
    return out


def add_gated_by_triton(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """`add_gated` by the Triton kernel, on NVIDIA GPUs or under Triton's interpreter."""
    import triton

    from dit_sparse.kernels.modulate_kernel import add_gated_kernel

    x, y = rows_of(x), rows_of(y)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, tokens, channels = x.shape
    gate = gate.reshape(-1, 1, channels).contiguous()
    strides = (*x.stride()[:2], *y.stride()[:2], *out.stride()[:2], broadcast_strides(gate)[0])
    with on_device_of(x):
        add_gated_kernel[tokens, batch](
            x, y, gate, out, *strides, channels, BLOCK=triton.next_power_of_2(channels), num_warps=8
        )
    return out


def _check_pairs(**pairs: tuple[Tensor | None, Tensor | None]) -> None:
    for names, (one, other) in pairs.items():
        if (one is None) != (other is None):
            raise ValueError(f"{names.replace('_', ' and ')} must both be given or both be None, got one of them")


def _takes(x: Tensor, *others: Tensor | None) -> bool:
    return x.ndim == 3 and x.dtype in _DTYPES and x.shape[-1] <= _LARGEST and takes_kernel(x, *others)
