"""Means, variances and products of blocks of tokens: all that a remainder knows of a block."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.score_tiles import use_triton
from dit_sparse.kernels.triton_launch import broadcast_strides, interpreted, on_device_of, padded, rows_of

__all__ = ["Moments", "block_moments", "by_kernel", "moments_by_triton", "products_tile"]

_LARGEST_TILE = 128  # value channels that one program holds products of
_ALIGNED = 8  # blocks; cuBLAS takes its fast kernels for these
_CHUNK_ELEMENTS = 1 << 17
_WARP_ELEMENTS = 1024  # of a tile of which one warp adds up some at once; sizes as timed on an H100
_MOST_PARTS = 4  # such tiles


class Moments(NamedTuple):
    """Moments of every block, in float32 (float64 for float64); zeros for an empty block.

    Args:
        mean: `[B, H, M, D]` of the tokens `x`.
        square: `[B, H, M, D]` mean square in each channel, of `x - mean` (the variance) or of `x` itself.
        v_mean: `[B, H, M, DV]` of the tokens `v`; `None` without.
        products: `[B, H, M', D, DV]` mean of `(x - mean)^T v`, in the dtype of `x`; `None` where not wanted. On a GPU
            `M'` is the multiple of 8 from `M` on, zeros past `M`: a sum over blocks of another length is slow there.
            In float16 at most 65,504, whatever they are.
        rounded, v_rounded: `mean` and `v_mean` in the dtypes of `x` and `v`, where they were asked for.
    """

    mean: Tensor
    square: Tensor
    v_mean: Tensor | None = None
    products: Tensor | None = None
    rounded: Tensor | None = None
    v_rounded: Tensor | None = None


def block_moments(
    x: Tensor,
    layout: BlockLayout,
    v: Tensor | None = None,
    *,
    centred: bool = True,
    products: bool = False,
    rounded: bool = False,
) -> Moments:
    """Moments of every block of `x` `[B, H, N, D]`, and of `v` `[B, H, N, DV]` with it.

    Args:
        x, v: the tokens, in the order that `layout` cuts.
        layout: their blocks.
        centred: whether `square` is the variance.
        products: whether they are wanted; `v` must be given, and `centred`.
        rounded: whether means are wanted in the tokens' dtypes too, as a kernel reads them.

    On a GPU one kernel reads `x` and `v` once; where gradients are wanted, or the dtype is float64, it is plain torch.
    """
    if by_kernel(*([x] if v is None else [x, v])):
        return moments_by_triton(x, layout, v, centred=centred, products=products, rounded=rounded)
    moments = _by_torch(x, layout, v, centred, products)
    if not rounded:
        return moments
    v_rounded = None if moments.v_mean is None or v is None else moments.v_mean.to(v.dtype)
    return moments._replace(rounded=moments.mean.to(x.dtype), v_rounded=v_rounded)


def _by_torch(x: Tensor, layout: BlockLayout, v: Tensor | None, centred: bool, products: bool) -> Moments:
    """`block_moments` in plain torch, anywhere."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts, count = layout.split(x.to(compute)), layout.sizes.clamp(min=1).to(compute)[..., None]
    values = None if v is None else layout.split(v.to(compute))
    mean, square = (torch.empty_like(parts[:, :, :, 0]) for _ in range(2))
    v_mean = None if values is None else torch.empty_like(values[:, :, :, 0])
    found = x.new_empty(*mean.shape, values.shape[-1]) if products and values is not None else None
    # The padding of short blocks is no token, so it must not differ from the mean.
    tokens = None if layout.is_even else torch.arange(parts.shape[3], device=x.device) < layout.sizes[..., None]
    # In pieces that stay in the cache, because fresh memory costs more than the arithmetic.
    step = max(1, _CHUNK_ELEMENTS // max(1, parts[:, :, :1].numel()))
    for start in range(0, parts.shape[2], step):
        part = slice(start, start + step)
        apart, own = parts[:, :, part], count[:, :, part]
        middle = mean[:, :, part] = apart.sum(3).div_(own)
        if centred:
            apart = apart - middle[..., None, :]
            if tokens is not None:
                apart *= tokens[:, :, part, :, None]
        if values is not None and v_mean is not None:
            v_mean[:, :, part] = values[:, :, part].sum(3).div_(own)
        if values is not None and found is not None:
            means = (apart.transpose(-1, -2) @ values[:, :, part]).div_(own[..., None])
            found[:, :, part] = means.clamp_(-torch.finfo(found.dtype).max, torch.finfo(found.dtype).max)
        square[:, :, part] = (apart * apart).sum(3).div_(own)
    return Moments(mean, square, v_mean, found)


def by_kernel(*inputs: Tensor) -> bool:
    """Whether a kernel makes the moments of `inputs`, and what a remainder needs of them."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return not learns and max(x.shape[-1] for x in inputs) <= 256 and use_triton("auto", *inputs)


def moments_by_triton(
    x: Tensor,
    layout: BlockLayout,
    v: Tensor | None = None,
    *,
    centred: bool = True,
    products: bool = False,
    rounded: bool = False,
) -> Moments:
    """As `block_moments`, by the kernels."""
    x = rows_of(x)
    values = x if v is None else rows_of(v)
    shape = *x.shape[:2], layout.offsets.shape[-1] - 1
    mean, square = (torch.empty(*shape, x.shape[-1], dtype=torch.float32, device=x.device) for _ in range(2))
    v_mean = mean if v is None else torch.empty(*shape, values.shape[-1], dtype=torch.float32, device=x.device)
    # Where they are not wanted another stands in for them, which the kernel leaves alone.
    own, v_own = (torch.empty_like(m, dtype=t.dtype) if rounded else m for m, t in ((mean, x), (v_mean, values)))
    sums = mean, square, v_mean, own, v_own
    with on_device_of(x):
        if products:
            assert v is not None
            assert centred
            found = _launch_products(x, values, layout, sums, rounded)
        else:
            found = None
            _launch_sums(x, values, layout, sums, centred, v is not None, rounded)
    moments = Moments(mean, square, None if v is None else v_mean, found)
    return moments._replace(rounded=own, v_rounded=None if v is None else v_own) if rounded else moments


def _launch_sums(
    x: Tensor, v: Tensor, layout: BlockLayout, sums: tuple[Tensor, ...], centred: bool, values: bool, rounded: bool
) -> None:
    """Fills `sums`, which stand in the order of the kernel's arguments."""
    from dit_sparse.kernels.remainder_kernels import sums_kernel

    mean, _, v_mean, _, _ = sums
    offsets = layout.offsets.contiguous()
    batch, heads, blocks, dim = mean.shape
    v_dim = v.shape[-1]
    rows = max(1, _WARP_ELEMENTS // padded(max(dim, v_dim)))
    sums_kernel[blocks, heads, batch](
        x, v, *sums, offsets, *x.stride()[:3], *v.stride()[:3], *mean.stride()[:3], *v_mean.stride()[:3],
        *broadcast_strides(offsets), blocks, *layout.blocks, D=dim, DV=v_dim, BLOCK_D=padded(dim),
        BLOCK_DV=padded(v_dim), BLOCK_N=rows, PARTS=max(1, min(_MOST_PARTS, -(-layout.blocks.largest // rows))),
        CENTRED=centred, VALUES=values, ROUNDED=rounded, num_warps=1,
    )  # fmt: skip


def _launch_products(x: Tensor, v: Tensor, layout: BlockLayout, sums: tuple[Tensor, ...], rounded: bool) -> Tensor:
    """Fills `sums` and returns the products."""
    import triton

    from dit_sparse.kernels.remainder_kernels import products_kernel

    mean, _, v_mean, _, _ = sums
    offsets = layout.offsets.contiguous()
    batch, heads, blocks, dim = mean.shape
    v_dim = v.shape[-1]
    found = x.new_empty(batch, heads, -(-blocks // _ALIGNED) * _ALIGNED, dim, v_dim)
    found[:, :, blocks:].zero_()
    block_dv = min(_LARGEST_TILE, padded(v_dim))
    parts = triton.cdiv(v_dim, block_dv)
    tile = products_tile(layout.blocks.largest, x.dtype, max(dim, v_dim), _on_hopper(x))
    products_kernel[triton.cdiv(blocks, tile.span) * parts, heads, batch](
        x, v, *sums, found, offsets, *x.stride()[:3], *v.stride()[:3], *mean.stride()[:3], *v_mean.stride()[:3],
        *found.stride()[:4], *broadcast_strides(offsets), blocks, *layout.blocks,
        D=dim, DV=v_dim, BLOCK_D=padded(dim), BLOCK_DV=block_dv, BLOCK_N=tile.rows, PARTS=parts, SPAN=tile.span,
        SINGLE=layout.blocks.largest <= tile.rows, ROUNDED=rounded, UPCAST=interpreted(), num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return found


def _on_hopper(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.get_device_capability(x.device) == (9, 0)


class ProductsTile(NamedTuple):
    """How the kernel of products goes through its blocks.

    Args:
        rows: tokens of a tile.
        span: blocks that one program goes through.
        num_warps, num_stages: as Triton has them.
    """

    rows: int
    span: int
    num_warps: int
    num_stages: int


def products_tile(largest: int, dtype: torch.dtype, dim: int, hopper: bool) -> ProductsTile:
    """A whole block in a tile where it fits in registers; on Hopper of the fast sizes each the fastest of those timed.

    Args:
        largest: tokens of the largest block.
        dtype, dim: of the tokens.
        hopper: whether the GPU is one, whose tensor cores read both sides from shared memory.

    There a block of several tiles has one stage: with more, Triton (3.6 to 3.9) copies the next tile to where a product
    in flight still reads.
    """
    if dtype == torch.float32 or dim > 128:
        return ProductsTile(16 if dtype == torch.float32 else 32, span=1, num_warps=8, num_stages=1)
    if largest > (256 if hopper else 64):
        rows, stages = (128, 1) if hopper else (32, 2)
        return ProductsTile(rows, span=1, num_warps=8, num_stages=stages)
    warps = 4 if hopper and largest <= 128 else 8
    return ProductsTile(max(16, padded(largest)), span=4, num_warps=warps, num_stages=2)
