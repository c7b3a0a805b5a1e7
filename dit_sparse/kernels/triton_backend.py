"""Backend "triton": block-sparse attention by a Triton kernel, for NVIDIA GPUs from compute capability 8.0 on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels import triton_skip
from dit_sparse.kernels.block_sparse import Call, block_sparse, register_launcher
from dit_sparse.kernels.remainder import RemainderTerms
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted, padded, plain_run, triton_unavailable
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockGeometry

__all__ = ["TritonBackend", "TritonLaunch", "launch_of", "refused_tensors"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LARGEST_DIM = 256


@dataclass(frozen=True)
class TritonLaunch:
    """How the kernel is compiled: the tile of queries and of keys, warps and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class TritonBackend:
    """The portable GPU kernel: any blocks, any head size up to 256, partial blocks, row sums, remainders, skipping."""

    name = "triton"
    remainders = REMAINDERS

    def unavailable(self, device: torch.device) -> str | None:
        return triton_unavailable(device)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        return refused_tensors(q, k, v) or (triton_skip.refusal(q, v, plan) if plan.skip_threshold else None)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return self.forward_counting(q, k, v, plan, scale=scale, return_lse=return_lse)[:2]

    def forward_counting(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return block_sparse(self.name, q, k, v, plan, scale, return_lse)


def refused_tensors(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot take these tensors, whatever the plan; `None` where they can."""
    if q.dtype not in _DTYPES:
        return f"dtype must be float32, float16 or bfloat16, got {q.dtype}"
    if max(q.shape[-1], v.shape[-1]) > _LARGEST_DIM:
        return f"head_dim must be at most {_LARGEST_DIM}, got {max(q.shape[-1], v.shape[-1])}"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "it has no backward; use torch.no_grad() or 'reference'"
    return None


def _launch(call: Call) -> None:
    if call.skipped is not None:
        triton_skip.launch(call)
        return
    import triton

    from dit_sparse.kernels.triton_kernels import forward_kernel

    q, v, bits = call.q, call.v, call.bits
    launch = launch_of(q, v, call.q_blocks, call.k_blocks, bits is not None)
    q_tiles = triton.cdiv(call.q_blocks.largest, launch.block_m)
    k_tiles = triton.cdiv(call.k_blocks.largest, launch.block_n)
    packed = call.counts[..., None, None, None] if bits is None else bits
    lse = call.out if call.lse is None else call.lse
    num_q_blocks = call.q_offsets.shape[-1] - 1
    means = _no_means(call) if call.terms is None else call.terms
    slopes = means.values[..., None] if means.slopes is None else means.slopes
    forward_kernel[num_q_blocks * q_tiles, q.shape[1], q.shape[0]](
        q, call.k, v, call.out, lse,
        call.q_offsets, call.k_offsets, call.counts, call.indices, call.partial_counts, call.partial_indices, packed,
        means.keys, means.values, means.bias, slopes,
        *(stride for x in (q, call.k, v, call.out) for stride in x.stride()[:3]), *lse.stride()[:2],
        *broadcast_strides(call.q_offsets), *broadcast_strides(call.k_offsets), *broadcast_strides(call.counts),
        *broadcast_strides(call.indices), call.indices.stride(2),
        *broadcast_strides(call.partial_counts), *broadcast_strides(call.partial_indices),
        call.partial_indices.stride(2), *broadcast_strides(packed), *packed.stride()[2:4],
        packed.shape[-1], call.q_blocks.largest, *plain_run(call.k_blocks, launch.block_n), call.k_blocks.largest,
        call.scale * math.log2(math.e),
        means.keys.shape[2], means.base,
        *(stride for x in (means.keys, means.values, means.bias) for stride in x.stride()[:3]), *slopes.stride()[:4],
        D=q.shape[-1], DV=v.shape[-1], BLOCK_D=padded(q.shape[-1]), BLOCK_DV=padded(v.shape[-1]),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, Q_TILES=q_tiles, K_TILES=k_tiles,
        PARTIAL=bits is not None, RETURN_LSE=call.lse is not None,
        MEANS=call.terms is not None, SLOPES=call.terms is not None and call.terms.slopes is not None,
        UPCAST=interpreted(),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _no_means(call: Call) -> RemainderTerms:
    """Stands in for terms that the kernel does not read."""
    return RemainderTerms(call.k, call.v, call.out, None)


register_launcher(TritonBackend.name, _launch)


def launch_of(
    q: Tensor, v: Tensor, q_blocks: BlockGeometry, k_blocks: BlockGeometry, partial: bool = False
) -> TritonLaunch:
    """Tiles, warps and stages for a call on its device; `partial`: whether blocks are kept in part."""
    if interpreted():
        return TritonLaunch(min(64, padded(q_blocks.largest)), min(32, padded(k_blocks.largest)), 4, 1)
    device = torch.cuda.get_device_properties(q.device)
    sizes = q_blocks.largest, k_blocks.largest, q.shape[-1], v.shape[-1]
    shared_memory: int = getattr(device, "shared_memory_per_block_optin", device.shared_memory_per_block)
    return configuration(*sizes, q.element_size(), device.major, shared_memory, partial)


def configuration(
    q_block: int, k_block: int, dim: int, v_dim: int, itemsize: int, major: int, shared_memory: int, partial: bool
) -> TritonLaunch:
    """The largest tiles that fit with two stages or more; those for 64 and 128 channels were measured on an H200.

    Args:
        q_block, k_block: tokens of the largest query and key block.
        dim, v_dim: channels of queries and keys, and of values.
        itemsize: bytes of an element.
        major: of the GPU's compute capability.
        shared_memory: bytes that one thread block may have.
        partial: whether there are partial blocks, whose bits take shared memory too.
    """
    block_m = 128 if q_block > 64 else 64 if q_block > 32 else 32
    block_n = 128 if k_block > 64 else 64 if k_block > 32 else 32
    dim, v_dim = padded(dim), padded(v_dim)
    wide = max(dim, v_dim)
    if itemsize == 4 or wide > 128:
        block_m, block_n = min(block_m, 64), min(block_n, 32 if itemsize == 4 else 64)
    if wide <= 64 and block_m == 128:
        block_n = min(block_n, 64)
    tiles = [n for n in (128, 64, 32, 16) if n <= block_n]
    stages = (4, 3, 2) if wide <= 64 else (3, 2) if major >= 9 else (2,)
    for tile_n, num_stages in [*itertools.product(tiles, stages), *((n, 1) for n in tiles)]:
        if _shared_memory(block_m, tile_n, num_stages, dim, v_dim, itemsize, partial) <= shared_memory:
            return TritonLaunch(block_m, tile_n, 8 if block_m == 128 else 4, num_stages)
    return TritonLaunch(32, 16, 4, 1)


def _shared_memory(block_m: int, block_n: int, stages: int, dim: int, v_dim: int, itemsize: int, partial: bool) -> int:
    """Upper bound of the bytes that a launch takes: queries, keys and values of all stages, and a little for sums.

    Where the weights pass through shared memory too, before compute capability 9.0, a stage fewer is held there.
    """
    bits = stages * block_m * block_n // 8 if partial else 0
    return itemsize * (block_m * dim + stages * block_n * (dim + v_dim)) + bits + 1024
