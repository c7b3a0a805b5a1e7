"""Backend "hopper": block-sparse attention by a warp-specialised Gluon kernel, for NVIDIA GPUs of capability 9.0."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.block_sparse import Call, block_sparse, register_launcher
from dit_sparse.kernels.hopper_launch import (
    aligned,
    descriptor,
    hopper_unavailable,
    is_aligned,
    multiprocessors,
    tile_layout,
)
from dit_sparse.kernels.remainder import RemainderTerms
from dit_sparse.kernels.triton_launch import broadcast_strides
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockGeometry

__all__ = ["HopperBackend"]

_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_DIM = 128
_KEYS = 128  # keys of a tile


@dataclass(frozen=True)
class _Variant:
    """How the kernel is compiled.

    Args:
        groups: consumer warpgroups of 64 query rows.
        stages_k, stages_v: slots of the rings.
        pair: two key blocks of 64 make a tile of 128.
        residents: thread blocks that fit on a multiprocessor.
        registers: limit of a thread, `None` for the compiler's own.
        q_in_registers: a consumer holds its queries in registers rather than in shared memory.
        early: their place is filled anew while they are worked on; the output then needs shared memory of its own.
    """

    groups: int
    stages_k: int
    stages_v: int
    pair: bool = False
    residents: int = 1
    registers: int | None = None
    q_in_registers: bool = False
    early: bool = False


# By (channels, query rows of a tile, key blocks of 64); each the fastest of those timed on an H200.
_VARIANTS = {
    (128, 128, False): _Variant(2, 2, 2, q_in_registers=True, early=True),
    (128, 128, True): _Variant(2, 2, 2, pair=True, q_in_registers=True, early=True),
    (128, 64, False): _Variant(1, 2, 1, residents=2, registers=128),
    (128, 64, True): _Variant(1, 2, 1, pair=True, residents=2, registers=128),
    (64, 128, False): _Variant(1, 3, 3, residents=2, registers=128, q_in_registers=True),
    (64, 128, True): _Variant(1, 3, 3, pair=True, residents=2, registers=128, q_in_registers=True),
    (64, 64, False): _Variant(1, 3, 3, residents=2, registers=128, q_in_registers=True),
    (64, 64, True): _Variant(1, 3, 3, pair=True, residents=2, registers=128, q_in_registers=True),
}


class HopperBackend:
    """The fast path of H100 and H200: even blocks, 16-bit types, up to 128 channels, partial blocks, remainders."""

    name = "hopper"
    remainders = REMAINDERS

    def unavailable(self, device: torch.device) -> str | None:
        return hopper_unavailable(device)

    def refuses(self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> str | None:
        if q.dtype not in _DTYPES:
            return f"dtype must be float16 or bfloat16, got {q.dtype}; use 'triton'"
        if q.shape[-1] > _LARGEST_DIM or q.shape[-1] % 8 or v.shape[-1] != q.shape[-1]:
            return (
                f"head_dim must be a multiple of 8, at most {_LARGEST_DIM} and the same for values, got {q.shape[-1]} "
                f"and {v.shape[-1]}; use 'triton'"
            )
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return "it has no backward; use torch.no_grad() or 'reference'"
        for name, order in (("query", plan.q_order), ("key", plan.kv_order)):
            sizes = order.geometry
            if sizes.largest > _KEYS and 2 * (sizes.run_end - sizes.run_start) < order.num_blocks:
                return (
                    f"{name} blocks above {_KEYS} tokens must be even, got {order.num_blocks} blocks of which "
                    f"only {sizes.run_end - sizes.run_start} have the largest size, {sizes.largest}; use 'triton'"
                )
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        return block_sparse(self.name, q, k, v, plan, scale, return_lse)[:2]


def _launch(call: Call) -> None:
    from dit_sparse.kernels.hopper_kernels import forward_kernel

    dim = 64 if call.q.shape[-1] <= 64 else 128
    variant = _variant(call, dim)
    span = 64 * variant.groups
    q_tiles = -(-call.q_blocks.largest // span)
    k_tiles = 1 if variant.pair else -(-call.k_blocks.largest // _KEYS)
    run_start, run_end = _plain_run(call.k_blocks, _KEYS // 2 if variant.pair else _KEYS)
    row_tiles = (call.q_offsets.shape[-1] - 1) * q_tiles
    batch, heads = call.q.shape[:2]
    tiles = batch * heads * row_tiles
    bits = call.counts[..., None, None, None] if call.bits is None else call.bits
    lse = call.out if call.lse is None else call.lse
    box = (_KEYS // 2, 64) if variant.pair else (_KEYS, dim)
    q, k, v = (aligned(x) for x in (call.q, call.k, call.v))
    out = call.out if is_aligned(call.out) else torch.empty_like(call.out, memory_format=torch.contiguous_format)
    grid = min(tiles, multiprocessors(q.device) * variant.residents)
    taken = torch.zeros(1, dtype=torch.int32, device=q.device)  # query tiles beyond the first of each thread block
    k_desc, v_desc = (descriptor(x, *box) for x in (k, v))
    means = [k_desc, v_desc, v_desc, k_desc]
    if call.terms is not None:
        means = [*(descriptor(x, *box) for x in _mean_tiles(call.terms)), descriptor(call.terms.bias, 1, _KEYS)]
        assert call.terms.bias.shape[-1] % _KEYS == 0
    mean_tiles = 0 if call.terms is None else call.terms.bias.shape[-1] // _KEYS
    forward_kernel[(grid,)](
        descriptor(q, 64, dim), k_desc, v_desc, descriptor(out, 64, dim), *means, out, lse, call.counts,
        call.indices, call.partial_counts, call.partial_indices, bits, call.q_offsets, call.k_offsets,
        *out.stride()[:3], *lse.stride()[:2], *broadcast_strides(call.q_offsets), *broadcast_strides(call.k_offsets),
        *broadcast_strides(call.counts), *broadcast_strides(call.indices), call.indices.stride(2),
        *broadcast_strides(call.partial_counts), *broadcast_strides(call.partial_indices),
        call.partial_indices.stride(2), *broadcast_strides(bits), *bits.stride()[2:4], bits.shape[-1],
        call.q_blocks.largest, tiles, heads, row_tiles, call.k_offsets.shape[-1] - 2, run_start, run_end,
        call.k_blocks.largest, q.shape[-1], call.scale * math.log2(math.e), taken,
        mean_tiles, 0.0 if call.terms is None else call.terms.base,
        GROUPS=variant.groups, D=dim, BLOCK_N=_KEYS, K_TILES=k_tiles, PAIR=variant.pair, Q_TILES=q_tiles,
        STAGES_K=variant.stages_k, STAGES_V=variant.stages_v, Q_IN_REGISTERS=variant.q_in_registers,
        PARTIAL=call.bits is not None, RETURN_LSE=call.lse is not None, EARLY=variant.early,
        FLAT=tile_layout((_KEYS, dim), q.dtype), MEANS=call.terms is not None,
        SLOPES=call.terms is not None and call.terms.slopes is not None, PRODUCER_REGISTERS=24, CONSUMER_REGISTERS=240,
        num_warps=4, maxnreg=variant.registers,
    )  # fmt: skip
    if out is not call.out:
        call.out.copy_(out)


register_launcher(HopperBackend.name, _launch)


def _mean_tiles(terms: RemainderTerms) -> list[Tensor]:
    """Means of keys and values, and the slopes of all blocks one under another, as tensors that TMA can address."""
    slopes = terms.values if terms.slopes is None else terms.slopes.flatten(2, 3)
    return [aligned(x) for x in (terms.keys, terms.values, slopes)]


def _variant(call: Call, dim: int) -> _Variant:
    """The variant for the sizes of a call."""
    return _VARIANTS[dim, 128 if call.q_blocks.largest > 64 else 64, call.k_blocks.largest <= _KEYS // 2]


def _plain_run(blocks: BlockGeometry, size: int) -> tuple[int, int]:
    """Key blocks that fill their tiles of `size` keys."""
    return blocks[1:] if blocks.largest % size == 0 else (0, 0)
