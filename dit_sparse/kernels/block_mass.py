"""Attention mass of every block, the score AdaSpa selects by, and block means.

mass[a, b] = sum over queries i of block a and keys j of block b of exp(scale * q_i . k_j - lse_i). Given the rows'
dense LSE it is the softmax's own mass, so a row of it sums to the block's number of queries. The N x N scores exist
only a few rows at a time.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import triton_mass
from dit_sparse.kernels.triton_backend import triton_unavailable

__all__ = ["block_mass", "pooled_blocks", "sample_rows"]

_CHUNK_SCORES = 1 << 20


@torch.no_grad()
def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    scale: float,
    backend: Literal["auto", "torch", "triton"] = "auto",
) -> Tensor:
    """Attention mass of each block, `[B, H, Mq, Mk]` float32; the second pass of AdaSpa (arXiv 2502.21079).

    Args:
        q, k: `[B, H, Nq, D]` and `[B, H, Nk, D]`, in the order that the offsets cut.
        lse: `[B, H, Nq]` natural-log row sums in the order of `q`; a row of -inf counts as no mass.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 block bounds, which may be uneven; read on the host.
        scale: factor of the scores.
        backend: "torch" anywhere, "triton" one fused kernel for NVIDIA GPUs, "auto" the second where it runs.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.
    """
    _validate(q, k, lse)
    if backend == "auto":
        backend = "triton" if q.is_cuda and triton_unavailable(q.device) is None else "torch"
    if backend == "triton":
        return triton_mass.block_mass(q, k, lse, q_offsets, k_offsets, scale)
    if backend != "torch":
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    q_blocks = BlockMask.block_of(q_offsets)
    mass = torch.zeros(*q.shape[:2], q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1, device=q.device)
    rows = min(q.shape[2], max(1, _CHUNK_SCORES // k.shape[2]))
    buffer = torch.empty(rows, k.shape[2], device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, q_block, k_bounds = k[b, h].float().t(), _at(q_blocks, b, h), _at(k_offsets, b, h)
            bounds = q_block[::rows].tolist(), [*q_block[rows - 1 :: rows].tolist(), mass.shape[2] - 1]
            for chunk, (first, last) in enumerate(zip(*bounds, strict=False)):
                part = slice(chunk * rows, (chunk + 1) * rows)
                blocks = torch.arange(first, last + 1, device=q.device)
                member = blocks[:, None] == q_block[part]
                queries = q[b, h, part].float() * scale
                columns = _chunk_mass(queries, keys, lse[b, h, part].float(), member, buffer)
                # Differences of running sums in float64: exact enough, and far cheaper than a scatter.
                running = F.pad(columns.cumsum(-1, dtype=torch.float64), (1, 0))
                mass[b, h, first : last + 1] += running.index_select(-1, k_bounds).diff(dim=-1)
    return mass


def _chunk_mass(queries: Tensor, keys: Tensor, lse: Tensor, member: Tensor, buffer: Tensor) -> Tensor:
    """`[A, Nk]` mass of each key in the query blocks of `member` `[A, m]` (bool), from `queries` `[m, D]`."""
    scores = torch.mm(queries, keys, out=buffer[: queries.shape[0]])
    # Softmax and a factor a row, because torch's exp is several times slower than the one inside softmax.
    peak = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    factor = (peak - scores.amax(-1).log_() - lse).exp_().masked_fill_(lse == float("-inf"), 0.0)
    return (member * factor) @ scores


def sample_rows(offsets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Every `stride`-th row of each block, at least one, for a block mass at a fraction of the cost.

    Args:
        offsets: `[1, 1, M+1]` int32 bounds of blocks that are not empty.
        stride: 1 takes every row.

    Returns:
        The rows' positions `[n]` int64, and the bounds `[1, 1, M+1]` int32 of the blocks among them.
    """
    block = BlockMask.block_of(offsets)[0, 0]
    sizes = offsets[0, 0].diff()
    place = torch.arange(block.shape[0], device=offsets.device) - offsets[0, 0][block]
    taken = place % stride == (sizes - 1).clamp(max=stride // 2)[block]
    counts = torch.zeros_like(sizes).index_add_(0, block, taken.to(sizes.dtype))
    return taken.nonzero()[:, 0], F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)[None, None]


def pooled_blocks(x: Tensor, offsets: Tensor) -> Tensor:
    """Mean of every block's tokens, `[B, H, M, D]` float32 (float64 for float64); zeros for an empty block.

    Args:
        x: `[B, H, N, D]` in the order that the offsets cut.
        offsets: `[B|1, H|1, M+1]` int32 block bounds, which may be uneven.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = BlockMask.block_of(offsets)[..., None].expand(*x.shape)
    sums = torch.zeros(*x.shape[:2], offsets.shape[-1] - 1, x.shape[-1], dtype=compute, device=x.device)
    return sums.scatter_add_(2, blocks, x.to(compute)) / offsets.diff(dim=-1).clamp(min=1)[..., None]


def _validate(q: Tensor, k: Tensor, lse: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in [B, H, N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])} like q, got {tuple(lse.shape)}")


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
