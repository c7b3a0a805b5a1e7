"""Launches the Triton kernel that skips blocks, whose tiles are the plan's blocks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.block_sparse import Call
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted, padded, plain_run
from dit_sparse.types import AttentionPlan

__all__ = ["SkipLaunch", "launch", "refusal", "skip_configuration"]

_LARGEST_BLOCK = 128


class SkipLaunch(NamedTuple):
    """How the kernel is compiled: the tile of queries and of keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def refusal(q: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
    """Why the kernel cannot skip the blocks of `plan`; `None` where it can."""
    blocks = plan.q_order.geometry.largest, plan.kv_order.geometry.largest
    if max(blocks) > _LARGEST_BLOCK:
        return f"where it skips, blocks must be at most {_LARGEST_BLOCK} tokens, one tile, got {max(blocks)}"
    if _configuration(q, v, *blocks) is None:
        return (
            f"tiles of {blocks[0]} x {blocks[1]} tokens, {q.shape[-1]} channels and {q.dtype} do not fit in this GPU's "
            "shared memory; make the blocks smaller"
        )
    return None


def launch(call: Call) -> None:
    """Fill `out`, `lse` and `skipped` of `call`."""
    from dit_sparse.kernels.skip_kernel import skip_kernel

    q, k, v, skipped = call.q, call.k, call.v, call.skipped
    assert skipped is not None
    tiles = _configuration(q, v, call.q_blocks.largest, call.k_blocks.largest)
    assert tiles is not None
    lse = call.out if call.lse is None else call.lse
    bits = call.counts[..., None, None, None] if call.bits is None else call.bits
    skip_kernel[call.q_offsets.shape[-1] - 1, q.shape[1], q.shape[0]](
        q, k, v, call.out, lse, skipped,
        call.q_offsets, call.k_offsets, call.counts, call.indices, call.partial_counts, call.partial_indices, bits,
        *(stride for x in (q, k, v, call.out) for stride in x.stride()[:3]), *lse.stride()[:2], *skipped.stride()[:2],
        *broadcast_strides(call.q_offsets), *broadcast_strides(call.k_offsets), *broadcast_strides(call.counts),
        *broadcast_strides(call.indices), call.indices.stride(2),
        *broadcast_strides(call.partial_counts), *broadcast_strides(call.partial_indices),
        call.partial_indices.stride(2), *broadcast_strides(bits), *bits.stride()[2:4], bits.shape[-1],
        call.q_blocks.largest, *plain_run(call.k_blocks, tiles.block_n),
        call.scale * math.log2(math.e), math.log2(call.skip_threshold),
        D=q.shape[-1], DV=v.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(v.shape[-1]),
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
        PARTIAL=call.bits is not None, RETURN_LSE=call.lse is not None, UPCAST=interpreted(),
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _configuration(q: Tensor, v: Tensor, q_block: int, k_block: int) -> SkipLaunch | None:
    if interpreted():
        return SkipLaunch(padded(q_block), padded(k_block), 4, 1)
    device = torch.cuda.get_device_properties(q.device)
    shared_memory: int = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return skip_configuration(q_block, k_block, q.shape[-1], v.shape[-1], q.element_size(), shared_memory)


def skip_configuration(
    q_block: int, k_block: int, dim: int, v_dim: int, itemsize: int, shared_memory: int
) -> SkipLaunch | None:
    """Tiles of whole blocks with as many stages as fit, three at most; `None` where one stage does not.

    Args:
        q_block, k_block: tokens of the largest query and key block, 128 at most.
        dim, v_dim: channels of queries and keys, and of values.
        itemsize: bytes of an element.
        shared_memory: bytes that one thread block may have.
    """
    block_m, block_n = padded(q_block), padded(k_block)
    # Queries, weights and one tile of values, whose load waits for the scores, beside the stages of keys.
    fixed = block_m * (padded(dim) + block_n) + block_n * padded(v_dim)
    for stages in (3, 2, 1):
        if itemsize * (fixed + stages * block_n * padded(dim)) + 1024 <= shared_memory:
            return SkipLaunch(block_m, block_n, 8 if block_m == 128 else 4, stages)
    return None
