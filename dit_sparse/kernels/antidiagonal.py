"""Scores of blocks by strided antidiagonals, as XAttention (arXiv 2503.16428) selects by.

Tokens of a block form groups of `stride`. The score of a query group a and a key group b is the sum over one
antidiagonal of their small score map: sum over s of q[a, stride - 1 - s] . k[b, s], which costs a `stride`-th of all
products. A softmax over all key groups turns a query group's scores into shares, and a block's score is their sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.score_tiles import ScoreBackend, channels, check_offsets, device_of, tiles, use_triton
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted
from dit_sparse.types import BlockGeometry

__all__ = ["antidiagonal_scores"]


@torch.no_grad()
def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    *,
    stride: int = 8,
    scale: float | None = None,
    backend: ScoreBackend = "auto",
    q_blocks: BlockGeometry | None = None,
    k_blocks: BlockGeometry | None = None,
) -> Tensor:
    """Share of attention that each block is expected to get, from every `stride`-th antidiagonal of the scores.

    Args:
        q, k: `[B, H, Nq, D]` and `[B, H, Nk, D]`, in the order that the offsets cut.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 block bounds, which may be uneven.
        stride: tokens of a group, from 1 (every score) on.
        scale: factor of the scores; `D ** -0.5` by default. The sum over an antidiagonal is divided by `stride`.
        backend: "triton" is one fused kernel for NVIDIA GPUs, "torch" runs anywhere and keeps a head's map of groups in
            memory; "auto" takes the former for CUDA tensors of up to 256 channels in float32, float16 or bfloat16.
        q_blocks, k_blocks: sizes of the blocks, an order's `geometry`, so that the Triton kernel never waits for the
            device; without them they are read from the offsets.

    Returns:
        `[B, H, Mq, Mk]` float32. A row sums to the query groups of its block, ceil(tokens / stride).

    Raises:
        ValueError: shapes that do not fit each other, a stride below 1, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.

    Source: XAttention, section 2.1 and `xattn_estimate` of its public code, with stride 8 and blocks of 128.
    Differs from the paper: not causal, and groups start anew in every block, so that blocks of any size do; tokens that
    the last group of a block lacks count as zeros, as the paper pads the sequence's end.
    """
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in [B, H, N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}: 8 is the paper's")
    check_offsets("q_offsets", q_offsets, q)
    check_offsets("k_offsets", k_offsets, k)
    scale = (q.shape[-1] ** -0.5 if scale is None else scale) / stride
    if use_triton(backend, q, k):
        q_blocks = BlockGeometry.of(q_offsets) if q_blocks is None else q_blocks
        k_blocks = BlockGeometry.of(k_offsets) if k_blocks is None else k_blocks
        return _by_triton(q, k, q_offsets, k_offsets, stride, scale, q_blocks, k_blocks)
    return _by_groups(q, k, q_offsets, k_offsets, stride, scale)


def _by_groups(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, stride: int, scale: float) -> Tensor:
    """The scores in plain torch: groups become long rows, whose products are the sums over antidiagonals."""
    shape = (*q.shape[:2], q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1)
    scores = torch.zeros(shape, dtype=torch.float32, device=q.device)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            q_rows, q_of = _groups(q[b, h], _at(q_offsets, b, h), stride)
            k_rows, k_of = _groups(k[b, h], _at(k_offsets, b, h), stride)
            products = q_rows.flip(1).flatten(1) @ k_rows.flatten(1).t()
            shares = (products * scale).softmax(-1)
            columns = torch.zeros(shares.shape[0], shape[3], dtype=torch.float32, device=q.device)
            scores[b, h].index_add_(0, q_of, columns.index_add_(1, k_of, shares))
    return scores


def _groups(x: Tensor, bounds: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """`x` `[N, D]` as groups `[G, stride, D]` float32 that start anew in each block, and the groups' blocks `[G]`."""
    counts = (bounds.diff() + stride - 1) // stride
    blocks = torch.repeat_interleave(torch.arange(counts.shape[0], device=x.device), counts)
    before = (counts.cumsum(0) - counts)[blocks]
    first = bounds[blocks] + (torch.arange(blocks.shape[0], device=x.device) - before) * stride
    positions = first[:, None] + torch.arange(stride, device=x.device)
    outside = positions >= bounds[blocks + 1][:, None]
    rows = x.float()[positions.clamp(max=x.shape[0] - 1)]
    return rows.masked_fill(outside[..., None], 0.0), blocks


def _by_triton(
    q: Tensor,
    k: Tensor,
    q_offsets: Tensor,
    k_offsets: Tensor,
    stride: int,
    scale: float,
    q_blocks: BlockGeometry,
    k_blocks: BlockGeometry,
) -> Tensor:
    import triton

    from dit_sparse.kernels.score_kernels import antidiagonal_kernel

    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    q_offsets, k_offsets = q_offsets.contiguous(), k_offsets.contiguous()
    blocks = q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1
    mass = torch.zeros(*q.shape[:2], *blocks, dtype=torch.float32, device=q.device)
    t = tiles(q, q_blocks, k_blocks, stride)
    with device_of(q):
        antidiagonal_kernel[triton.cdiv(blocks[0], t.group) * t.q_tiles, q.shape[1], q.shape[0]](
            q, k, mass, q_offsets, k_offsets,
            *q.stride()[:3], *k.stride()[:3], *mass.stride()[:3],
            *broadcast_strides(q_offsets), *broadcast_strides(k_offsets), *blocks, scale * math.log2(math.e),
            **channels(q), BLOCK_M=t.block_m, BLOCK_N=t.block_n, GROUP=t.group, K_GROUP=t.k_group,
            Q_TILES=t.q_tiles, K_TILES=t.k_tiles, STRIDE=stride, UPCAST=interpreted(),
            **t.launch,
        )  # fmt: skip
    return mass


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
