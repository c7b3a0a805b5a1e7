"""Means of blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.score_tiles import ScoreBackend, channels, check_offsets, device_of, use_triton
from dit_sparse.kernels.triton_launch import broadcast_strides

__all__ = ["pooled_blocks"]


@torch.no_grad()
def pooled_blocks(x: Tensor, offsets: Tensor, *, backend: ScoreBackend = "auto") -> Tensor:
    """Mean of every block's tokens, `[B, H, M, D]` float32 (float64 for float64); zeros for an empty block.

    The mean queries and keys whose products SpargeAttn (arXiv 2502.18137) and others select blocks by.

    Args:
        x: `[B, H, N, D]` in the order that the offsets cut.
        offsets: `[B|1, H|1, M+1]` int32 block bounds, which may be uneven.
        backend: "triton" is one pass over `x` on NVIDIA GPUs, "torch" runs anywhere; "auto" takes the former for CUDA
            tensors of up to 256 channels in float32, float16 or bfloat16.

    Raises:
        ValueError: shapes that do not fit, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.
    """
    if x.ndim != 4:
        raise ValueError(f"x must be [B, H, N, D], got {tuple(x.shape)}")
    check_offsets("offsets", offsets, x)
    if use_triton(backend, x):
        return _by_triton(x, offsets)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    positions = torch.arange(x.shape[2], dtype=torch.int32, device=x.device)
    positions = positions.expand(*offsets.shape[:2], -1).contiguous()
    blocks = torch.searchsorted(offsets[..., 1:].contiguous(), positions, right=True)
    sums = torch.zeros(*x.shape[:2], offsets.shape[-1] - 1, x.shape[-1], dtype=compute, device=x.device)
    sums.scatter_add_(2, blocks[..., None].expand(x.shape), x.to(compute))
    return sums / offsets.diff(dim=-1).clamp(min=1)[..., None]


def _by_triton(x: Tensor, offsets: Tensor) -> Tensor:
    from dit_sparse.kernels.score_kernels import pooled_kernel

    x, offsets = x if x.stride(-1) == 1 else x.contiguous(), offsets.contiguous()
    num_blocks = offsets.shape[-1] - 1
    out = torch.empty(*x.shape[:2], num_blocks, x.shape[-1], dtype=torch.float32, device=x.device)
    with device_of(x):
        pooled_kernel[num_blocks, x.shape[1], x.shape[0]](
            x, out, offsets, *x.stride()[:3], *out.stride()[:3], *broadcast_strides(offsets),
            **channels(x), BLOCK_N=32, num_warps=4,
        )  # fmt: skip
    return out
