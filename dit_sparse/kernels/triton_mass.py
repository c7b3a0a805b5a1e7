"""Launches the Triton kernel that sums attention mass by blocks; see `block_mass`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.score_tiles import channels, device_of, tiles
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted
from dit_sparse.types import BlockGeometry

__all__ = ["block_mass"]


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    scale: float,
    q_blocks: BlockGeometry,
    k_blocks: BlockGeometry,
) -> Tensor:
    """Attention mass of each block, `[B, H, Mq, Mk]` float32; arguments as in `dit_sparse.kernels.block_mass`."""
    import triton

    from dit_sparse.kernels.score_kernels import block_mass_kernel

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    lse, q_offsets, k_offsets = lse.float().contiguous(), q_offsets.contiguous(), k_offsets.contiguous()
    blocks = q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1
    mass = torch.zeros(*q.shape[:2], *blocks, dtype=torch.float32, device=q.device)
    t = tiles(q, q_blocks, k_blocks)
    with device_of(q):
        block_mass_kernel[triton.cdiv(blocks[0], t.group) * t.q_tiles, q.shape[1], q.shape[0]](
            q, k, lse, mass, q_offsets, k_offsets,
            *q.stride()[:3], *k.stride()[:3], *lse.stride()[:2], *mass.stride()[:3],
            *broadcast_strides(q_offsets), *broadcast_strides(k_offsets),
            *blocks, *t.run, scale * math.log2(math.e),
            **channels(q), BLOCK_M=t.block_m, BLOCK_N=t.block_n, GROUP=t.group, K_GROUP=t.k_group,
            Q_TILES=t.q_tiles, K_TILES=t.k_tiles, UPCAST=interpreted(),
            **t.launch, maxnreg=128 if t.block_m * t.block_n == 128 * 128 else None,
        )  # fmt: skip
    return mass
