"""Triton kernel: means, mean squares and products of blocks. Oracle: `block_moments`' path in plain torch.

Grid: (blocks x tiles of value channels, heads, batch). Imported by its launcher when that first runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply


@triton.jit
def store_row(base, row, channels, end):
    tl.store(base + channels, row, mask=channels < end)


@triton.jit
def add_tile(
    tokens, positions, end, middle, v, v_sn, v_channels, v_end, squares, v_total, acc,
    CENTRED: tl.constexpr, VALUES: tl.constexpr, PRODUCTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One more tile of tokens in the sums of squares, of values and of products."""
    apart = tokens.to(tl.float32)
    if CENTRED:
        apart = tl.where((positions < end)[:, None], apart - middle[None, :], 0.0)
    squares += tl.sum(apart * apart, 0)
    if VALUES:
        inside = (positions < end)[:, None] & (v_channels < v_end)[None, :]
        pointers = v + positions.to(tl.int64)[:, None] * v_sn + v_channels[None, :]
        values = tl.load(pointers, mask=inside, other=0.0)
        v_total += tl.sum(values.to(tl.float32), 0)
        if PRODUCTS:
            acc += multiply(tl.trans(apart.to(values.dtype)), values, UPCAST)
    return squares, v_total, acc


@triton.jit
def moments_kernel(
    x, v, mean, square, v_mean, products, offsets,
    x_sb, x_sh, x_sn, v_sb, v_sh, v_sn, m_sb, m_sh, m_sm, vm_sb, vm_sh, vm_sm, p_sb, p_sh, p_sm, p_sd, f_sb, f_sh,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, CENTRED: tl.constexpr, VALUES: tl.constexpr, PRODUCTS: tl.constexpr, SINGLE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Moments of one block; `BLOCK_DV` channels of the values.

    A block of one tile (SINGLE) is read once and stays in registers; larger ones are read twice, then from the cache.
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    block, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    bounds = offsets + b * f_sb + h * f_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    size = tl.maximum(end - start, 1).to(tl.float32)
    channels = tl.arange(0, BLOCK_D)
    x += b * x_sb + h * x_sh
    v += b * v_sb + h * v_sh + part * BLOCK_DV
    v_channels = tl.arange(0, BLOCK_DV)
    v_end = DV - part * BLOCK_DV
    squares = tl.zeros([BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_DV], tl.float32)
    acc = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
    if SINGLE:
        positions = start + tl.arange(0, BLOCK_N)
        tokens = load_tile(x, positions, end, x_sn, D, BLOCK_D, True)
        middle = tl.sum(tokens.to(tl.float32), 0) / size
        squares, v_total, acc = add_tile(
            tokens, positions, end, middle, v, v_sn, v_channels, v_end, squares, v_total, acc, CENTRED, VALUES,
            PRODUCTS, UPCAST,
        )  # fmt: skip
    else:
        total = tl.zeros([BLOCK_D], tl.float32)
        for first in tl.range(start, end, BLOCK_N):
            tokens = load_tile(x, first + tl.arange(0, BLOCK_N), end, x_sn, D, BLOCK_D, True)
            total += tl.sum(tokens.to(tl.float32), 0)
        middle = total / size
        for first in tl.range(start, end, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            tokens = load_tile(x, positions, end, x_sn, D, BLOCK_D, True)
            squares, v_total, acc = add_tile(
                tokens, positions, end, middle, v, v_sn, v_channels, v_end, squares, v_total, acc, CENTRED, VALUES,
                PRODUCTS, UPCAST,
            )  # fmt: skip
    row = b * m_sb + h * m_sh + block * m_sm
    store_row(mean + row, middle, channels, D)
    store_row(square + row, squares / size, channels, D)
    if VALUES:
        store_row(v_mean + b * vm_sb + h * vm_sh + block * vm_sm + part * BLOCK_DV, v_total / size, v_channels, v_end)
    if PRODUCTS:
        pointers = products + b * p_sb + h * p_sh + block * p_sm + channels[:, None] * p_sd
        pointers += part * BLOCK_DV + v_channels[None, :]
        inside = (channels < D)[:, None] & (v_channels < v_end)[None, :]
        tl.store(pointers, (acc / size).to(products.dtype.element_ty), mask=inside)
