"""RMS norm and rotary embedding of queries and keys: on a GPU one pass over each instead of about ten."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.triton_launch import on_device_of, rows_of, takes_kernel

__all__ = ["norm_rope", "norm_rope_by_torch", "norm_rope_by_triton", "rotate"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """x / rms(x) * weight, then pairs of channels turned by the rotary angles.

    On a CPU, under a compiler, or where gradients are wanted this is `norm_rope_by_torch`, which computes what
    diffusers computes, bit for bit; on a GPU one kernel, equal up to rounding.

    Args:
        x: `[B, N, H, D]` queries or keys as they come from their projection.
        weight: `[H * D]` for a norm across heads, `[D]` for a norm of every head.
        eps: added to the mean square.
        cos, sin: `[1, N, 1, D]` or `[N, D]` tables in which each angle stands twice, as diffusers makes them with
            `repeat_interleave_real`; `None` turns nothing.

    Returns:
        `[B, N, H, D]` in `x`'s dtype.

    Source: RoFormer (arXiv 2104.09864), equation 34; RMSNorm (arXiv 1910.07467), equation 4.
    """
    if x.dtype in _DTYPES and takes_kernel(x, weight):
        return norm_rope_by_triton(x, weight, eps, cos, sin)
    return norm_rope_by_torch(x, weight, eps, cos, sin)


def norm_rope_by_torch(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`norm_rope` in plain torch, anywhere; the oracle of the kernel."""
    across = weight.numel() != x.shape[-1]
    flat = x.flatten(2) if across else x
    x = F.rms_norm(flat, weight.shape, weight, eps).view(x.shape)
    return x if cos is None or sin is None else rotate(x, cos, sin)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` `[B, N, H, D]` with pairs of channels turned by tables `[1, N, 1, D]` or `[N, D]`, each angle twice."""
    cos, sin = (table.reshape(1, x.shape[1], 1, x.shape[-1]) for table in (cos, sin))
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    if _turns_as_complex(x, cos):
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


def _turns_as_complex(x: Tensor, table: Tensor) -> bool:
    """Whether a product of complex numbers turns `x` in one pass instead of eight, and by the same roundings.

    That is so on a CPU with vectors of up to 64 bytes, where pairs fill whole ones; the rest of a row is rounded
    otherwise. Compilers take complex numbers apart again.
    """
    if x.device.type != "cpu" or not x.dtype == table.dtype == torch.float32 or torch.compiler.is_compiling():
        return False
    whole = x.shape[-1] % 16 == 0 and x.stride(-1) == 1
    return whole and all(n % 2 == 0 for n in (*x.stride()[:-1], x.storage_offset()))


def norm_rope_by_triton(x: Tensor, weight: Tensor, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """`norm_rope` by the Triton kernel, on NVIDIA GPUs or under Triton's interpreter."""
    import triton

    from dit_sparse.kernels.norm_rope_kernel import norm_rope_kernel

    x = rows_of(x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    batch, tokens, heads, dim = x.shape
    tables = [weight if table is None else table.reshape(tokens, dim).contiguous() for table in (cos, sin)]
    with on_device_of(x):
        norm_rope_kernel[tokens, batch](
            x, out, weight.contiguous(), *tables, *x.stride()[:3], *out.stride()[:3], dim, dim, heads, eps,
            D=dim, BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(dim),
            PER_HEAD=weight.numel() == dim, ROTATE=cos is not None and sin is not None, num_warps=8,
        )  # fmt: skip
    return out
