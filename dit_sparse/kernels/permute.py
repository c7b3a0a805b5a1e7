"""Tokens into a plan's order and back: on a GPU one launch for q, k and v, at the speed of a copy."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.triton_launch import broadcast_strides, on_device_of, rows_of, takes_kernel
from dit_sparse.types import TokenOrder

__all__ = ["gather_by_triton", "permute", "restore"]

_TILE_BYTES = 1 << 14  # what one program moves; enough loads in flight to reach the memory's speed


def permute(order: TokenOrder, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[B, H, N, D]` tensor with its tokens moved into `order`; the tensors themselves where nothing moves."""
    return tensors if order.is_identity else _gather(order.index, tensors)


def restore(order: TokenOrder, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Each `[B, H, N, D]` tensor in `order` moved back; the exact inverse of `permute`."""
    return tensors if order.is_identity else _gather(order.inverse, tensors)


def _gather(index: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not all(takes_kernel(x) for x in tensors):
        # Torch's own gather has a backward, and a compiler fuses it with what stands around it.
        return tuple(_gather_by_torch(x, index) for x in tensors)
    alike = len({(x.shape, x.stride(), x.dtype) for x in tensors}) == 1
    if alike and len(tensors) <= 3:
        return gather_by_triton(index, *tensors)
    return tuple(gather_by_triton(index, x)[0] for x in tensors)


def _gather_by_torch(x: Tensor, index: Tensor) -> Tensor:
    if index.shape[:2] == (1, 1):
        return x.index_select(2, index[0, 0])
    return x.gather(2, index[..., None].expand(*x.shape[:2], -1, x.shape[-1]))


def gather_by_triton(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """`x[b, h, index[b, h, n]]` of one to three `[B, H, N, D]` tensors of one shape, dtype and strides, in one launch.

    On NVIDIA GPUs, or under Triton's interpreter. `index` is int64 `[B|1, H|1, N]`; the results have the strides of
    `torch.empty_like`.
    """
    import triton

    from dit_sparse.kernels.permute_kernel import gather_kernel

    tensors = tuple(rows_of(x) for x in tensors)
    x, index = tensors[0], index.contiguous()
    results = tuple(torch.empty_like(x) for _ in tensors)
    if not x.numel():
        return results
    y = results[0]
    batch, heads, tokens, dim = x.shape
    block = triton.next_power_of_2(dim)
    tile = max(16, _TILE_BYTES // (block * x.element_size()))
    three = [(tensors[i], results[i]) if i < len(tensors) else (x, y) for i in range(3)]
    with on_device_of(x):
        gather_kernel[triton.cdiv(tokens, tile), batch * heads, len(tensors)](
            *(source for source, _ in three), *(result for _, result in three), index,
            *x.stride()[:3], *y.stride()[:3], *broadcast_strides(index), heads, tokens,
            D=dim, BLOCK_D=block, TILE=tile, num_warps=4,
        )  # fmt: skip
    return results
