"""Launches the Triton kernel that sums attention mass by blocks; see `block_mass`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.backend import BackendUnavailableError
from dit_sparse.kernels.triton_backend import broadcast_strides, interpreted, padded, triton_unavailable

__all__ = ["block_mass"]


def block_mass(q: Tensor, k: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Attention mass of each block, `[B, H, Mq, Mk]` float32; arguments as in `dit_sparse.kernels.block_mass`."""
    missing = triton_unavailable(q.device)
    if missing is not None:
        raise BackendUnavailableError(f"backend 'triton' is not available on {q.device}: {missing}")
    import triton

    from dit_sparse.kernels.triton_kernels import block_mass_kernel

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse, q_offsets, k_offsets = lse.float().contiguous(), q_offsets.contiguous(), k_offsets.contiguous()
    blocks = q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1
    mass = torch.zeros(*q.shape[:2], *blocks, device=q.device)
    q_block, q_whole = _sizes(q_offsets)
    k_block, k_whole = _sizes(k_offsets)
    block_m, block_n, group = _tiles(q_block, k_block, q_whole >= blocks[0] - 1)
    q_tiles, k_tiles = triton.cdiv(q_block, block_m), triton.cdiv(k_block, block_n)
    block_mass_kernel[triton.cdiv(blocks[0], group) * q_tiles, q.shape[1], q.shape[0]](
        q, k, lse, mass, q_offsets, k_offsets,
        *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2], *mass.stride()[:3],
        *broadcast_strides(q_offsets), *broadcast_strides(k_offsets),
        *blocks, k_whole if k_block % block_n == 0 else 0, scale * math.log2(math.e),
        D=q.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_M=block_m, BLOCK_N=block_n, GROUP=group,
        Q_TILES=q_tiles, K_TILES=k_tiles, UPCAST=interpreted(), num_warps=8 if block_m == 128 else 4, num_stages=3,
    )  # fmt: skip
    return mass


def _sizes(offsets: Tensor) -> tuple[int, int]:
    """Tokens in the largest block, and how many leading blocks all have that many."""
    sizes = offsets.diff(dim=-1).cpu()
    largest = int(sizes.max())
    return largest, int((sizes == largest).flatten(0, 1).all(0).int().cumprod(0).sum())


def _tiles(q_block: int, k_block: int, even: bool) -> tuple[int, int, int]:
    """Queries and keys of a tile, and how many query blocks one tile holds: several where they are small and even."""
    block_m, block_n = (32, 32) if interpreted() else (128, 64 if k_block <= 64 else 128)
    block_n = min(block_n, max(16, padded(k_block)))
    if even and block_m % q_block == 0:
        return block_m, block_n, block_m // q_block
    return min(block_m, padded(q_block)), block_n, 1
