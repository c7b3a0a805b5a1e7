"""Bias of the blocks' means and their weights in a matrix C, of all query blocks, by two Triton kernels.

It computes to 16 bits, for tokens of 16 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import Moments
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted, on_device_of, padded
from dit_sparse.types import Remainder

__all__ = ["weigh_by_triton"]

_ROW = 128  # a row of the bias is of whole tiles of means, as the Hopper kernel copies it
_SHARED_ROWS = 4  # rows of weights that one program makes


def weigh_by_triton(
    queries: Moments,
    keys: Moments,
    k_layout: BlockLayout,
    kept: Tensor,
    scale: float,
    remainder: Remainder,
    head_remainders: Tensor | None,
    limit: float,
    base: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """Bias less `base` and, where `keys` have products, `scale` times the weights, both `[B, H, Mq, M']`.

    Args:
        queries, keys: moments of the query and key blocks, in float32.
        k_layout: the key blocks.
        kept: `[B|1, H|1, Mq, Mk]` bool.
        scale: factor of the scores.
        remainder, head_remainders: as in `AttentionPlan`.
        limit: of the spread, above which a block leaves no remainder.
        base: taken off the bias.
        dtype: of the bias.

    The `M'` of the bias is the multiple of 128 from `Mk` on, -inf past the last block. Weights have the dtype and the
    columns of the products, zeros past the last block.
    """
    import triton

    from dit_sparse.kernels.remainder_kernels import share_kernel, weigh_kernel

    batch, heads, q_blocks, dim = queries.mean.shape
    k_blocks = keys.mean.shape[2]
    kept = kept.expand(*kept.shape[:2], q_blocks, k_blocks).contiguous().view(torch.uint8)
    row = -(-k_blocks // _ROW) * _ROW
    bias = queries.mean.new_empty(batch, heads, q_blocks, row, dtype=dtype)
    weighs = keys.products is not None
    scores = queries.mean.new_empty(batch, heads, q_blocks, row) if weighs else bias
    offsets = k_layout.offsets.contiguous()
    own = offsets[..., 0] if head_remainders is None else head_remainders
    block = 16 if interpreted() or dim > 128 else 64
    tiles = triton.cdiv(q_blocks, block) * (row // block)
    with on_device_of(bias):
        weigh_kernel[tiles, heads, batch](
            queries.mean, queries.square, keys.mean, keys.square, kept, offsets, own, bias, scores,
            *queries.mean.stride()[:3], *keys.mean.stride()[:3], *broadcast_strides(kept), kept.stride(2),
            *broadcast_strides(offsets), *broadcast_strides(own), *bias.stride()[:3], *scores.stride()[:3],
            q_blocks, k_blocks, row, scale, limit, base,
            D=dim, BLOCK_D=padded(dim), BLOCK_M=block, BLOCK_N=block, MASS=remainder == "mass", SCORES=weighs,
            LEVELS=head_remainders is not None, UPCAST=interpreted(), num_warps=4, num_stages=1,
        )  # fmt: skip
    if keys.products is None:
        return bias, None
    weights = keys.products.new_empty(batch, heads, q_blocks, keys.products.shape[2])
    with on_device_of(bias):
        share_kernel[triton.cdiv(q_blocks, _SHARED_ROWS), heads, batch](
            scores, own, weights, *scores.stride()[:3], *broadcast_strides(own), *weights.stride()[:3], q_blocks,
            k_blocks, weights.shape[-1], scale, BLOCK_M=_SHARED_ROWS, BLOCK_N=512,
            LEVELS=head_remainders is not None, num_warps=4,
        )  # fmt: skip
    return bias, weights
