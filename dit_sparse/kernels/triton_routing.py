"""Launches the Triton kernel that finds the blocks to keep as it attends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import Moments, block_moments
from dit_sparse.kernels.remainder import LARGEST_SPREAD
from dit_sparse.kernels.routing import Route, row_moments
from dit_sparse.kernels.triton_backend import TritonLaunch, launch_of, refused_tensors
from dit_sparse.kernels.triton_launch import (
    broadcast_strides,
    interpreted,
    on_device_of,
    padded,
    plain_run,
    rows_of,
    triton_unavailable,
)
from dit_sparse.types import AttentionPlan, BlockMask, Remainder

__all__ = ["check_routed_call", "check_routing", "routed_attention"]

_TILE = 64


def check_routing(backend: str, remainder: Remainder, device: torch.device | None = None) -> None:
    """Whether blocks may be routed in the kernel under such a schedule; for callers who want to know before a run.

    Args:
        backend: what was asked for.
        remainder: of the plans.
        device: where it will run, if it is known.

    Raises:
        ValueError: another backend or remainder than the kernel's, or a device that it does not run on.
    """
    reason = _refused_remainder(remainder)
    if backend not in ("auto", "triton"):
        reason = f"backend must be 'auto' or 'triton', got {backend!r}"
    if device is not None:
        reason = reason or triton_unavailable(device)
    if reason is not None:
        raise _refused(reason)


def check_routed_call(q: Tensor, k: Tensor, v: Tensor, route: Route, remainder: Remainder) -> None:
    """Whether `routed_attention` computes this call; arguments as there.

    Raises:
        ValueError: it does not, for the remainder, the device, dtype, head size or wanted gradients, or because a block
            is larger than a tile.
    """
    reason = _refused_remainder(remainder) or triton_unavailable(q.device) or refused_tensors(q, k, v)
    if reason is None:
        largest, most = route.order.geometry.largest, _tiles(q, v, route).block_m
        if largest > most:
            reason = f"blocks must be at most {most} tokens, one tile, got {largest}"
    if reason is not None:
        raise _refused(reason)


def _refused(reason: str) -> ValueError:
    return ValueError(f"blocks cannot be routed in the kernel: {reason}; set in_kernel to False to plan them first")


def _refused_remainder(remainder: Remainder) -> str | None:
    return None if remainder in ("none", "mean") else f"remainder must be 'none' or 'mean', got {remainder!r}"


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
        ValueError: what `check_routed_call` says.

    Source: Sol-Attn (arXiv 2607.24027).
    """
    check_routed_call(q, k, v, route, remainder)
    q, k, v = (rows_of(x) for x in (q, k, v))
    layout = BlockLayout(route.order.offsets, route.order.geometry, q.shape[2])
    queries, keys = block_moments(q, layout, centred=False), block_moments(k, layout, v, rounded=True)
    assert keys.rounded is not None
    assert keys.v_rounded is not None
    mean, deviation = row_moments(queries.mean, keys.rounded.float(), route.counted)
    means = keys.rounded, keys.v_rounded, mean + route.tau * deviation
    counts, pairs = torch.empty_like(mean, dtype=torch.int32), torch.empty_like(mean, dtype=torch.int32)
    indices = counts.new_empty(*counts.shape, counts.shape[-1])
    lists = counts, pairs, indices, torch.empty_like(indices, dtype=torch.uint8)
    out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else q.new_empty(*q.shape[:-1], v.shape[-1])
    with on_device_of(q):
        stand_ins = route.words if remainder == "none" else _stand_ins(queries, keys, route.words, q.shape[-1] ** -0.5)
        _launch(q, k, v, out, means, route, stand_ins, lists, remainder == "mean")
    offsets = route.order.offsets
    mask = BlockMask(counts, indices, offsets, offsets, kept_pairs=pairs.sum(-1, dtype=torch.float64))
    mask.__dict__["full_blocks"] = lists[3].view(torch.bool)  # known already; making it of the lists takes a scatter
    return out, AttentionPlan(route.order, route.order, mask, remainder)


def _stand_ins(queries: Moments, keys: Moments, forced: Tensor, scale: float) -> Tensor:
    """`[B, H, M, ceil(M/32)]` int32, a bit for each block that is not `forced` and whose mean may stand in."""
    from dit_sparse.kernels.routed_kernel import stand_in_kernel

    batch, heads, blocks, dim = queries.square.shape
    words = -(-blocks // 32)
    found = torch.empty(batch, heads, blocks, words, dtype=torch.int32, device=queries.square.device)
    rows = 16 if interpreted() else 64
    stand_in_kernel[-(-blocks // rows) * words, heads, batch](
        queries.square, keys.square, forced, found, *queries.square.stride()[:3], *keys.square.stride()[:3],
        *broadcast_strides(forced), forced.stride(2), *found.stride()[:3], blocks, blocks, words,
        LARGEST_SPREAD / (scale * scale / 2),
        D=dim, BLOCK_D=padded(dim), BLOCK_M=rows, UPCAST=interpreted(), num_warps=4, num_stages=1,
    )  # fmt: skip
    return found


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    means: tuple[Tensor, ...],
    route: Route,
    stand_ins: Tensor,
    lists: tuple[Tensor, ...],
    attends_to_means: bool,
) -> None:
    """Fill `out` and `lists`; `means` and `lists` stand in the order of the kernel's arguments."""
    from dit_sparse.kernels.routed_kernel import routed_kernel

    mean_k, mean_v, needed = means
    counts, _, indices, _ = lists
    offsets, words = route.order.offsets.contiguous(), route.words
    sizes = offsets.diff(dim=-1)
    blocks, tiles = route.order.geometry, _tiles(q, v, route)
    routed_kernel[counts.shape[-1], q.shape[1], q.shape[0]](
        q, k, v, out, *means, sizes, words, stand_ins, offsets, offsets, *lists,
        *(stride for x in (q, k, v, out, mean_k, mean_v) for stride in x.stride()[:3]),
        *needed.stride()[:2], *broadcast_strides(sizes), *broadcast_strides(words), words.stride(2),
        *broadcast_strides(stand_ins), stand_ins.stride(2), *broadcast_strides(offsets), *broadcast_strides(offsets),
        *counts.stride()[:2], *indices.stride()[:3], *plain_run(blocks, tiles.block_n), blocks.largest,
        counts.shape[-1], q.shape[-1] ** -0.5 * math.log2(math.e),
        D=q.shape[-1], DV=v.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(v.shape[-1]),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, K_TILES=-(-blocks.largest // tiles.block_n),
        TILE=min(_TILE, tiles.block_n), MEANS=attends_to_means, UPCAST=interpreted(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _tiles(q: Tensor, v: Tensor, route: Route) -> TritonLaunch:
    return launch_of(q, v, route.order.geometry, route.order.geometry)
