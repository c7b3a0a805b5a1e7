"""FlashAttention-3's forward on Hopper: out = softmax(scale * q k^T) v, with the row sums.

Follows `flash_attn_func` in `fa3_fwd_interface.py` of the fa3-fwd 0.0.3 wheel: tensors are `[B, N, H, D]`, the row sums
`[B, H, N]` float32 in natural log. `fa3_fwd_config.py` of that wheel switches float16 and the backward off.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

__all__ = ["fa3_attention", "fa3_refuses", "fa3_unavailable", "positive_scale"]

_LARGEST_DIM = 256


def fa3_unavailable(device: torch.device) -> str | None:
    """What is missing to run FlashAttention-3 on `device`, and how to get it; `None` when nothing is."""
    if importlib.util.find_spec("fa3_fwd_interface") is None:
        return "fa3-fwd is not installed; pip install 'dit-sparse[fa3]'"
    if device.type != "cuda":
        return "FlashAttention-3 runs on CUDA only; use 'sdpa' here"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"FlashAttention-3 needs compute capability 9.0 (Hopper), this GPU has {major}.{minor}; use 'sdpa'"
    return None


def fa3_refuses(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why FlashAttention-3 cannot compute dense attention of `q, k, v` `[B, H, N, D]`; `None` when it can."""
    if q.dtype != torch.bfloat16:
        return f"dtype must be bfloat16, the only one that fa3-fwd is built for, got {q.dtype}"
    dim = q.shape[-1]
    if dim != v.shape[-1] or dim % 8 or not 8 <= dim <= _LARGEST_DIM:
        return (
            f"head_dim must be one multiple of 8 up to {_LARGEST_DIM} for q, k and v, got {dim} and {v.shape[-1]}; "
            "use 'sdpa'"
        )
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "fa3-fwd has no backward; use torch.no_grad() or 'sdpa'"
    return None


def fa3_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention and its row sums by FlashAttention-3, for what `fa3_refuses` accepts.

    Args:
        q, k, v: `[B, H, N, D]` bfloat16 on a Hopper GPU.
        scale: factor of the scores.

    Returns:
        Output `[B, H, Nq, D]` bfloat16 and natural-log row sums `[B, H, Nq]` float32.
    """
    from fa3_fwd_interface import flash_attn_func

    q, scale = positive_scale(q, scale)
    q, k, v = ((x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in (q, k, v))
    # The row sums are computed anyway; the flag only returns them.
    out, lse = flash_attn_func(q, k, v, softmax_scale=scale, causal=False, return_attn_probs=True)
    return out.transpose(1, 2), lse


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0: flash kernels take the maximum of a row before they scale it."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
