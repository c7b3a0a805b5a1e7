"""Attention mass of every block, the score AdaSpa selects by.

mass[a, b] = sum over queries i of block a and keys j of block b of exp(scale * q_i . k_j - lse_i). Given the rows'
dense LSE it is the softmax's own mass, so a row of it sums to the block's number of queries. The N x N scores exist
only a few rows at a time.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.kernels import triton_mass
from dit_sparse.kernels.score_tiles import ScoreBackend, check_offsets, use_triton
from dit_sparse.types import BlockGeometry, TokenOrder

__all__ = ["block_mass", "sample_rows", "sampled_block_mass"]

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
    backend: ScoreBackend = "auto",
    q_blocks: BlockGeometry | None = None,
    k_blocks: BlockGeometry | None = None,
) -> Tensor:
    """Attention mass of each block, `[B, H, Mq, Mk]` float32; the second pass of AdaSpa (arXiv 2502.21079).

    Args:
        q, k: `[B, H, Nq, D]` and `[B, H, Nk, D]`, in the order that the offsets cut.
        lse: `[B, H, Nq]` natural-log row sums in the order of `q`; a row of -inf counts as no mass.
        q_offsets, k_offsets: `[B|1, H|1, M+1]` int32 block bounds, which may be uneven.
        scale: factor of the scores.
        backend: "triton" is one fused kernel for NVIDIA GPUs, "torch" runs anywhere; "auto" takes the former for CUDA
            tensors of up to 256 channels in float32, float16 or bfloat16.
        q_blocks, k_blocks: sizes of the blocks, an order's `geometry`, so that the Triton kernel never waits for the
            device; without them they are read from the offsets.

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        BackendUnavailableError: the backend cannot run here.
    """
    _validate(q, k, lse)
    check_offsets("q_offsets", q_offsets, q)
    check_offsets("k_offsets", k_offsets, k)
    if use_triton(backend, q, k):
        q_blocks = BlockGeometry.of(q_offsets) if q_blocks is None else q_blocks
        k_blocks = BlockGeometry.of(k_offsets) if k_blocks is None else k_blocks
        return triton_mass.block_mass(q, k, lse, q_offsets, k_offsets, scale, q_blocks, k_blocks)
    return _by_chunks(q, k, lse, q_offsets, k_offsets, scale)


def sampled_block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    *,
    stride: int,
    scale: float,
    backend: ScoreBackend = "auto",
) -> Tensor:
    """Attention mass of each block over every `stride`-th query of its block, `[B, H, Mq, Mk]` float32.

    Each sampled query's mass is exact. The rows are found once an order: later calls do not wait for the device.

    Args:
        q, k, lse: as in `block_mass`, in the orders' positions.
        q_order, kv_order: the orders, of which only the blocks are used.
        stride: 1 reads every query.
        scale, backend: as in `block_mass`.

    Raises:
        ValueError: as in `block_mass`, or a stride above 1 where heads have blocks of their own.
        BackendUnavailableError: the backend cannot run here.
    """
    q_offsets, q_blocks = q_order.offsets, q_order.geometry
    if stride > 1:
        _validate(q, k, lse)
        rows = _sampled(q_order, stride)
        q, lse = q.index_select(2, rows.positions), lse.index_select(2, rows.positions)
        q_offsets, q_blocks = rows.offsets, rows.blocks
    return block_mass(
        q,
        k,
        lse,
        q_offsets,
        kv_order.offsets,
        scale=scale,
        backend=backend,
        q_blocks=q_blocks,
        k_blocks=kv_order.geometry,
    )


def _by_chunks(q: Tensor, k: Tensor, lse: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """Block masses in plain torch, a few rows of scores at a time."""
    shape = (*q.shape[:2], q_offsets.shape[-1] - 1, k_offsets.shape[-1] - 1)
    mass = torch.zeros(shape, dtype=torch.float32, device=q.device)
    q_blocks = BlockMask.block_of(q_offsets)
    rows = min(q.shape[2], max(1, _CHUNK_SCORES // k.shape[2]))
    buffer = torch.empty(rows, k.shape[2], dtype=torch.float32, device=q.device)
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


@dataclass(frozen=True)
class _Sampled:
    """Sampled rows of an order: their positions, and the blocks among them."""

    positions: Tensor
    offsets: Tensor
    blocks: BlockGeometry


_known: weakref.WeakKeyDictionary[TokenOrder, dict[int, _Sampled]] = weakref.WeakKeyDictionary()


def _sampled(order: TokenOrder, stride: int) -> _Sampled:
    """Rows that `sample_rows` takes; the answer lasts as long as the order."""
    known = _known.setdefault(order, {})
    if stride not in known:
        # Tensors made in inference mode could not be used where gradients are recorded.
        with torch.inference_mode(False):
            positions, offsets = sample_rows(order.offsets, stride)
        known[stride] = _Sampled(positions, offsets, BlockGeometry.of(offsets))
    return known[stride]


def sample_rows(offsets: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Every `stride`-th row of each block, at least one of each that is not empty.

    Args:
        offsets: `[1, 1, M+1]` int32 block bounds, read on the host.
        stride: 1 takes every row.

    Returns:
        The rows' positions `[n]` int64, and the bounds `[1, 1, M+1]` int32 of the blocks among them.

    Raises:
        ValueError: offsets of more than one head, or a stride below 1.
    """
    if offsets.shape[:2] != (1, 1):
        raise ValueError(
            f"offsets must be [1, 1, M+1] to sample rows, got {tuple(offsets.shape)}: share them or use stride 1"
        )
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}: 1 takes every row")
    block = BlockMask.block_of(offsets)[0, 0]
    sizes = offsets[0, 0].diff()
    place = torch.arange(block.shape[0], device=offsets.device) - offsets[0, 0][block]
    taken = place % stride == (sizes - 1).clamp(max=stride // 2)[block]
    counts = torch.zeros_like(sizes).index_add_(0, block, taken.to(sizes.dtype))
    return taken.nonzero()[:, 0], F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)[None, None]


def _validate(q: Tensor, k: Tensor, lse: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must agree in [B, H, N, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {tuple(q.shape[:3])} like q, got {tuple(lse.shape)}")


def _at(x: Tensor, b: int, h: int) -> Tensor:
    return x[b % x.shape[0], h % x.shape[1]]
