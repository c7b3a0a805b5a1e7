"""Launches the Triton kernel that finds the blocks to keep as it attends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import block_moments
from dit_sparse.kernels.remainder import LARGEST_SPREAD
from dit_sparse.kernels.routing import Route, row_moments
from dit_sparse.kernels.triton_backend import TritonLaunch, launch_of, refused_tensors
from dit_sparse.kernels.triton_launch import (
    broadcast_strides,
    interpreted,
    on_device_of,
    padded,
    rows_of,
    triton_unavailable,
)
from dit_sparse.types import AttentionPlan, BlockMask, Remainder

__all__ = ["routed_attention", "routing_refusal"]

_TILE = 64  # means at a time


def routing_refusal(q: Tensor, k: Tensor, v: Tensor, route: Route, remainder: Remainder) -> str | None:
    """Why `routed_attention` cannot compute this call; `None` where it can."""
    if remainder not in ("none", "mean"):
        return f"remainder must be 'none' or 'mean' where blocks are routed in the kernel, got {remainder!r}"
    lacks = triton_unavailable(q.device) or refused_tensors(q, k, v)
    if lacks is not None:
        return lacks
    largest, most = route.order.geometry.largest, _tiles(q, v, route).block_m
    if largest > most:
        return f"blocks must be at most {most} tokens, a tile, where they are routed in the kernel, got {largest}"
    return None


@torch.no_grad()
def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, route: Route, remainder: Remainder = "mean"
) -> tuple[Tensor, AttentionPlan]:
    """`sparse_attention` under `routed_plan`, in one Triton kernel that finds the blocks as it attends.

    Args:
        q, k, v: `[B, H, N, D]` in the order of `route`, any strides.
        route: which blocks are kept.
        remainder: "none" or "mean".

    Returns:
        Output `[B, H, N, D]` in the order of `route`, and the plan that was followed. Scores are those of the tokens'
        dtype, so a block within its rounding of the limit may be kept or not.

    Raises:
        ValueError: what `routing_refusal` says.
    """
    reason = routing_refusal(q, k, v, route, remainder)
    if reason is not None:
        raise ValueError(f"blocks cannot be routed in the kernel: {reason}")
    q, k, v = (rows_of(x) for x in (q, k, v))
    layout = BlockLayout(route.order.offsets, route.order.geometry, q.shape[2])
    queries, keys = block_moments(q, layout, centred=False), block_moments(k, layout, v, rounded=True)
    assert keys.rounded is not None
    assert keys.v_rounded is not None
    mean, deviation = row_moments(queries.mean, keys.rounded.float(), route.counted)
    needed = mean + route.tau * deviation
    counts, pairs = torch.empty_like(needed, dtype=torch.int32), torch.empty_like(needed, dtype=torch.int32)
    indices = counts.new_empty(*counts.shape, counts.shape[-1])
    out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
    moments = keys.rounded, keys.square, keys.v_rounded, queries.square, needed
    with on_device_of(q):
        _launch(q, k, v, out, moments, route, (counts, pairs, indices), remainder == "mean")
    offsets = route.order.offsets
    mask = BlockMask(counts, indices, offsets, offsets, kept_pairs=pairs.sum(-1, dtype=torch.float64))
    return out, AttentionPlan(route.order, route.order, mask, remainder)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    moments: tuple[Tensor, ...],
    route: Route,
    lists: tuple[Tensor, ...],
    means: bool,
) -> None:
    """Fill `out` and `lists`; `moments` and `lists` stand in the order of the kernel's arguments."""
    from dit_sparse.kernels.routed_kernel import routed_kernel

    mean_k, _, mean_v, square_q, needed = moments
    counts, _, indices = lists
    offsets, forced = route.order.offsets.contiguous(), route.forced.contiguous().view(torch.uint8)
    blocks, tiles = route.order.geometry, _tiles(q, v, route)
    # The even run fills its tiles only where tiles divide the blocks.
    run = blocks[1:] if blocks.largest % tiles.block_n == 0 else (0, 0)
    scale = q.shape[-1] ** -0.5
    routed_kernel[counts.shape[-1], q.shape[1], q.shape[0]](
        q, k, v, out, *moments, forced, offsets, offsets, *lists,
        *(stride for x in (q, k, v, out, mean_k, mean_v, square_q) for stride in x.stride()[:3]),
        *needed.stride()[:2], *broadcast_strides(forced), forced.stride(2), *broadcast_strides(offsets),
        *broadcast_strides(offsets), *counts.stride()[:2], *indices.stride()[:3], *run, blocks.largest,
        counts.shape[-1], scale * math.log2(math.e), LARGEST_SPREAD / (scale * scale / 2),
        D=q.shape[-1], DV=v.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(v.shape[-1]),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, K_TILES=-(-blocks.largest // tiles.block_n),
        TILE=min(_TILE, tiles.block_n), MEANS=means, UPCAST=interpreted(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _tiles(q: Tensor, v: Tensor, route: Route) -> TritonLaunch:
    return launch_of(q, v, route.order.geometry, route.order.geometry)
