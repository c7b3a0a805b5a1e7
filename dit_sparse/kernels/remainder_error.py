"""Error that is left where a block's mean stands in for its tokens: the score that SVG-EAR selects by.

For a query p and the tokens t of block j, with scores s_t = scale * p . k_t, s_j = scale * p . mean(k_t) and Z the sum
of exp(s) over all keys,

    error[p, j] = sum over t in j of |exp(s_t) v_t - exp(s_j) mean(v)|^2 / Z^2,

and |..|^2 adds up to sum e^2s |v|^2 - 2 e^s_j sum e^s <v, mean(v)> + B_j e^2s_j |mean(v)|^2. A query block is probed
with a few means of its queries, so that a few rows of scores a block are made, and never many of them at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.pooled import pooled_blocks
from dit_sparse.kernels.score_tiles import ScoreBackend, use_triton
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted, on_device_of, padded, rows_of
from dit_sparse.types import TokenOrder

__all__ = ["divide_blocks", "remainder_errors"]

_CHUNK_SCORES = 1 << 20
_CHUNK_SCORES_GPU = 1 << 27
_SPAN = 64  # key blocks that one program goes through


@torch.no_grad()
def remainder_errors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: TokenOrder,
    kv_order: TokenOrder,
    *,
    probes: int = 1,
    scale: float | None = None,
    backend: ScoreBackend = "auto",
) -> Tensor:
    """Log of the error that leaving each key block to its mean makes, estimated by a few mean queries a block.

    Args:
        q, k, v: `[B, H, N, D]`, in the orders' positions.
        q_order, kv_order: the orders, of which only the blocks are used; they may be uneven and differ between heads.
        probes: each query block is cut into so many stretches, and the error is the mean over their mean queries.
        scale: of the scores; `D ** -0.5` by default.
        backend: "triton" is one fused kernel for NVIDIA GPUs, "torch" runs anywhere; "auto" takes the former for CUDA
            tensors of up to 256 channels in float32, float16 or bfloat16.

    Returns:
        `[B, H, Mq, Mk]` float32 (float64 for float64): natural log of the squared error of the output. -inf for an
        empty block, and for one that leaves less than float32 tells from nothing.

    Raises:
        ValueError: no probe, or shapes that do not fit.
        BackendUnavailableError: the backend cannot run here.

    Source: SVG-EAR (arXiv 2603.08982), error-aware routing.
    Differs from the paper: divided by the probe's sum of weights, so that the errors of all rows compare; any number of
    probes, where the paper takes the cluster's centroid.
    """
    if k.shape != v.shape[:3] + k.shape[3:] or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k, v must agree in [B, H, N, D], got {[tuple(x.shape) for x in (q, k, v)]}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    offsets = divide_blocks(q_order.offsets, probes)
    means = pooled_blocks(q, offsets)
    if use_triton(backend, q, k, v):
        errors, totals = _by_triton(means, k, v, kv_order, scale)
    else:
        errors, totals = _by_chunks(means, k, v, kv_order, scale)
    errors -= 2 * totals[..., None]
    # The mean over a block's probes, each by its queries; a stretch of none counts for nothing.
    counts = offsets.diff(dim=-1).to(errors.dtype).unflatten(-1, (-1, probes))
    shares = (counts / counts.sum(-1, keepdim=True).clamp(min=1)).log()
    return (errors.unflatten(2, (-1, probes)) + shares[..., None]).logsumexp(3)


def divide_blocks(offsets: Tensor, parts: int) -> Tensor:
    """Bounds `[B|1, H|1, M * parts + 1]` int32 of each block's `parts` stretches of nearly equal size, some empty.

    Args:
        offsets: `[B|1, H|1, M+1]` int32 block bounds.
        parts: at least 1.

    Raises:
        ValueError: no part.
    """
    if parts < 1:
        raise ValueError(f"parts must be at least 1, got {parts}: 1 leaves the blocks whole")
    place = torch.arange(parts, dtype=torch.int32, device=offsets.device)
    inner = offsets[..., :-1, None] + offsets.diff(dim=-1)[..., None] * place // parts
    return torch.cat([inner.flatten(-2), offsets[..., -1:]], -1)


def _by_chunks(means: Tensor, k: Tensor, v: Tensor, order: TokenOrder, scale: float) -> tuple[Tensor, Tensor]:
    """Log errors `[B, H, R, Mk]` before division, and log sums `[B, H, R]`, in plain torch, a few rows at a time."""
    compute = torch.float64 if k.dtype == torch.float64 else torch.float32
    batch, heads, count = means.shape[:3]
    errors = torch.empty(batch, heads, count, order.num_blocks, dtype=compute, device=k.device)
    totals = torch.empty(batch, heads, count, dtype=compute, device=k.device)
    rows = max(1, (_CHUNK_SCORES if k.device.type == "cpu" else _CHUNK_SCORES_GPU) // k.shape[2])
    for b in range(batch):
        for h in range(heads):
            layout = BlockLayout.of_head(order, b, h)
            keys, norms, overlaps, ends = _head_terms(k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1], layout, compute)
            for start in range(0, count, rows):
                part = (b, h, slice(start, start + rows))
                scores = (means[part].to(compute) * scale) @ keys.T
                found = _chunk_errors(scores, norms, overlaps, ends, layout)
                errors[part], totals[part] = found
    return errors, totals


def _head_terms(k: Tensor, v: Tensor, layout: BlockLayout, compute: torch.dtype) -> tuple[Tensor, ...]:
    """Of one head: keys `[N, D]`, `|v|^2` and `<v, mean(v)>` `[N]`, and bounds of the blocks `[Mk+1]`."""
    parts = layout.split(v.to(compute))
    middle = parts.sum(3, keepdim=True) / layout.sizes.clamp(min=1)[..., None, None]
    overlaps = layout.join((parts * middle).sum(-1, keepdim=True))[0, 0, :, 0]
    return k[0, 0].to(compute), v[0, 0].to(compute).square().sum(-1), overlaps, layout.offsets[0, 0].long()


def _chunk_errors(
    scores: Tensor, norms: Tensor, overlaps: Tensor, bounds: Tensor, layout: BlockLayout
) -> tuple[Tensor, Tensor]:
    """Log errors `[r, Mk]` and log sums `[r]` of rows of scores `[r, N]`."""

    def sums(x: Tensor) -> Tensor:
        if layout.is_even:
            return x.unflatten(-1, (-1, layout.blocks.largest)).sum(-1)
        # Differences of running sums in float64: exact enough, and far cheaper than a scatter.
        running = torch.nn.functional.pad(x.cumsum(-1, dtype=torch.float64), (1, 0))
        return running.index_select(-1, bounds).diff(dim=-1).to(x.dtype)

    sizes = bounds.diff().to(scores.dtype)
    top = scores.amax(-1, keepdim=True)
    of_mean = (sums(scores) / sizes.clamp(min=1) - top).exp()
    weights = (scores - top).exp_()
    total = weights.sum(-1, keepdim=True)
    cross = sums(weights * overlaps)
    squared = sums(weights.square_().mul_(norms))
    # The overlaps of a block with its mean value add up to its size times the mean's square.
    error = squared - 2 * of_mean * cross + of_mean.square() * sums(overlaps[None])
    return error.clamp_(min=0).log() + 2 * top, (total.log() + top)[:, 0]


def _by_triton(means: Tensor, k: Tensor, v: Tensor, order: TokenOrder, scale: float) -> tuple[Tensor, Tensor]:
    """As `_by_chunks`, by the kernels; nothing waits for the device."""
    import triton

    from dit_sparse.kernels.remainder_error_kernels import remainder_error_kernel, value_overlaps_kernel

    k, v, offsets = rows_of(k), rows_of(v), order.offsets.contiguous()
    batch, heads, tokens, dim = k.shape
    blocks, rows = order.num_blocks, means.shape[2]
    means = means.to(k.dtype)  # of the keys' type, as the tensor cores want it
    norms, overlaps = torch.empty(2, batch, heads, tokens, dtype=torch.float32, device=k.device)
    errors, sums = torch.empty(2, batch, heads, rows, blocks, dtype=torch.float32, device=k.device)
    block_m = 32 if k.dtype == torch.float32 or interpreted() else 128
    block_n = min(block_m, 64, padded(order.geometry.largest))
    strides = broadcast_strides(offsets)
    with on_device_of(k):
        value_overlaps_kernel[blocks, heads, batch](
            v, norms, overlaps, offsets, *v.stride()[:3], *norms.stride()[:2], *strides,
            D=v.shape[-1], BLOCK_D=padded(v.shape[-1]), BLOCK_N=32, num_warps=4,
        )  # fmt: skip
        remainder_error_kernel[triton.cdiv(rows, block_m) * triton.cdiv(blocks, _SPAN), heads, batch](
            means, k, norms, overlaps, errors, sums, offsets,
            *means.stride()[:3], *k.stride()[:3], *norms.stride()[:2], *errors.stride()[:3], *strides,
            rows, blocks, scale * math.log2(math.e),
            D=dim, BLOCK_D=padded(dim), BLOCK_M=block_m, BLOCK_N=block_n, SPAN=_SPAN, UPCAST=interpreted(),
            num_warps=4 if block_m == 32 else 8, num_stages=2,
        )  # fmt: skip
    return errors, sums.logsumexp(-1)
