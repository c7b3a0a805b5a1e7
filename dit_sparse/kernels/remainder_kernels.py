"""Triton kernels of a remainder: the moments of blocks, and from them each block's bias and its share in a matrix C.

Oracles: `block_moments`' path in plain torch, and `remainder_terms`'. Imported by their launchers when these first run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply
from dit_sparse.types import REMAINDERS

MEAN_LEVEL, VALUE_LEVEL, MASS_LEVEL = (tl.constexpr(REMAINDERS.index(name)) for name in ("mean", "value", "mass"))


@triton.jit
def store_row(base, row, channels, end):
    tl.store(base + channels, row.to(base.dtype.element_ty), mask=channels < end)


@triton.jit
def add_tile(
    x, v, positions, end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VALUES: tl.constexpr,
    PRODUCTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One more tile of tokens in the sums: of `x`, of the square of `x - origin`, of values, of products `x^T v`."""
    tokens = load_tile(x, positions, end, x_sn, D, BLOCK_D, True)
    wide = tokens.to(tl.float32)
    total += tl.sum(wide, 0)
    apart = tl.where((positions < end)[:, None], wide - origin[None, :], 0.0)
    squares += tl.sum(apart * apart, 0)
    if VALUES:
        v_channels = tl.arange(0, BLOCK_DV)
        inside = (positions < end)[:, None] & (v_channels < v_end)[None, :]
        pointers = v + positions.to(tl.int64)[:, None] * v_sn + v_channels[None, :]
        values = tl.load(pointers, mask=inside, other=0.0)
        v_total += tl.sum(values.to(tl.float32), 0)
        if PRODUCTS:
            acc += multiply(tl.trans(tokens), values, UPCAST)
    return total, squares, v_total, acc


@triton.jit
def moments_kernel(
    x, v, mean, square, v_mean, products, offsets,
    x_sb, x_sh, x_sn, v_sb, v_sh, v_sn, m_sb, m_sh, m_sm, vm_sb, vm_sh, vm_sm, p_sb, p_sh, p_sm, p_sd, f_sb, f_sh,
    blocks, largest, run_start, run_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, CENTRED: tl.constexpr, VALUES: tl.constexpr, PRODUCTS: tl.constexpr,
    SINGLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Moments of SPAN blocks; `BLOCK_DV` channels of the values. Grid: (spans x tiles of value channels, heads, batch).

    Every token is read once. Squares are taken around the block's first token, so that a mean far from zero takes no
    digits from a variance. The bounds of blocks in the even run are reckoned, as a load would have to come first.
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    first_block, part = (tl.program_id(0) // PARTS) * SPAN, tl.program_id(0) % PARTS
    offsets += b * f_sb + h * f_sh
    channels = tl.arange(0, BLOCK_D)
    v_channels = tl.arange(0, BLOCK_DV)
    x += b * x_sb + h * x_sh
    v += b * v_sb + h * v_sh + part * BLOCK_DV
    v_end = DV - part * BLOCK_DV
    run_origin = tl.load(offsets + run_start, mask=run_start > 0, other=0) - run_start * largest
    for number in tl.range(0, tl.minimum(SPAN, blocks - first_block)):
        block = (first_block + number).to(tl.int64)
        uneven = (block < run_start) | (block >= run_end)
        reckoned = run_origin + block * largest
        start = tl.where(uneven, tl.load(offsets + block, mask=uneven, other=0), reckoned)
        end = tl.where(uneven, tl.load(offsets + block + 1, mask=uneven, other=0), reckoned + largest)
        size = tl.maximum(end - start, 1).to(tl.float32)
        origin = tl.zeros([BLOCK_D], tl.float32)
        if CENTRED:
            inside = (channels < D) & (start < end)
            origin = tl.load(x + start * x_sn + channels, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_D], tl.float32)
        v_total = tl.zeros([BLOCK_DV], tl.float32)
        acc = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
        if SINGLE:
            total, squares, v_total, acc = add_tile(
                x, v, start + tl.arange(0, BLOCK_N), end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
                D, DV, BLOCK_D, BLOCK_DV, VALUES, PRODUCTS, UPCAST,
            )  # fmt: skip
        else:
            for first in tl.range(start, end, BLOCK_N):
                total, squares, v_total, acc = add_tile(
                    x, v, first + tl.arange(0, BLOCK_N), end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
                    D, DV, BLOCK_D, BLOCK_DV, VALUES, PRODUCTS, UPCAST,
                )  # fmt: skip
        row = b * m_sb + h * m_sh + block * m_sm
        middle = total / size
        squares /= size
        if CENTRED:
            squares = tl.maximum(squares - (middle - origin) * (middle - origin), 0.0)
        store_row(mean + row, middle, channels, D)
        store_row(square + row, squares, channels, D)
        if VALUES:
            v_middle = v_total / size
            v_row = b * vm_sb + h * vm_sh + block * vm_sm + part * BLOCK_DV
            store_row(v_mean + v_row, v_middle, v_channels, v_end)
            if PRODUCTS:
                # The mean of (x - mean)^T v is that of x^T v less the product of the means.
                found = acc / size - middle[:, None] * v_middle[None, :]
                pointers = products + b * p_sb + h * p_sh + block * p_sm + channels[:, None] * p_sd
                pointers += part * BLOCK_DV + v_channels[None, :]
                kept = (channels < D)[:, None] & (v_channels < v_end)[None, :]
                tl.store(pointers, found.to(products.dtype.element_ty), mask=kept)


@triton.jit
def split(x):
    """A float32 tile as the sum of two bfloat16 ones, to 16 bits."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def multiply_split(a, a_low, b, b_low, UPCAST: tl.constexpr):
    """`a @ b^T` of tiles that `split` has cut; tensor cores take float32 in no other way as precisely and as fast."""
    found = multiply(a, tl.trans(b), UPCAST)
    return found + multiply(a, tl.trans(b_low), UPCAST) + multiply(a_low, tl.trans(b), UPCAST)


@triton.jit
def weigh_kernel(
    q_mean, q_square, k_mean, k_square, kept, k_offsets, levels, bias, weights,
    q_sb, q_sh, q_sm, k_sb, k_sh, k_sm, t_sb, t_sh, t_sm, f_sb, f_sh, l_sb, l_sh, b_sb, b_sh, b_sm, w_sb, w_sh, w_sm,
    q_blocks, k_blocks, columns, scale, largest_spread, base,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASS: tl.constexpr,
    WEIGHTS: tl.constexpr, LEVELS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bias of every block's mean for BLOCK_M query blocks, and (WEIGHTS) what it is worth to their mean query.

    `weights` have `columns` of them, `k_blocks` or more, and hold zeros past the last block. Grid: (tiles of query
    blocks, heads, batch). Heads may have (LEVELS) a remainder of their own, by its place in `REMAINDERS`.
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = (rows < q_blocks)[:, None]
    wide_rows = rows.to(tl.int64)[:, None]
    q_base = b * q_sb + h * q_sh
    k_base = b * k_sb + h * k_sh
    kept += b * t_sb + h * t_sh + wide_rows * t_sm
    k_offsets += b * f_sb + h * f_sh
    bias += b * b_sb + h * b_sh + wide_rows * b_sm
    squares = load_tile(q_square + q_base, rows, q_blocks, q_sm, D, BLOCK_D, True) * (scale * scale / 2)
    squares, squares_low = split(squares)
    middle = load_tile(q_mean + q_base, rows, q_blocks, q_sm, D, BLOCK_D, True) * scale
    middle, middle_low = split(middle)
    if LEVELS:
        level = tl.load(levels + b * l_sb + h * l_sh)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, k_blocks, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = column < k_blocks
        variances = load_tile(k_square + k_base, column, k_blocks, k_sm, D, BLOCK_D, True)
        variances, variances_low = split(variances)
        spread = multiply_split(squares, squares_low, variances, variances_low, UPCAST)
        sizes = tl.load(k_offsets + column + 1, mask=inside, other=0)
        sizes -= tl.load(k_offsets + column, mask=inside, other=0)
        logs = tl.where(sizes > 0, tl.log(tl.maximum(sizes, 1).to(tl.float32)), -float("inf"))[None, :]
        hidden = tl.load(kept + column[None, :], mask=own & inside[None, :], other=1) != 0
        found = logs + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if MASS:
            larger = tl.minimum(spread, logs)
            found += tl.where(level >= MASS_LEVEL, larger, 0.0) if LEVELS else larger
        hidden = hidden | (spread > largest_spread)
        if LEVELS:
            hidden = hidden | (level < MEAN_LEVEL)
        found = tl.where(hidden, -float("inf"), found)
        tl.store(bias + column[None, :], (found - base).to(bias.dtype.element_ty), mask=own & inside[None, :])
        if WEIGHTS:
            keys, keys_low = split(load_tile(k_mean + k_base, column, k_blocks, k_sm, D, BLOCK_D, True))
            scores = multiply_split(middle, middle_low, keys, keys_low, UPCAST) + found
            new = tl.maximum(peak, tl.max(scores, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            total = total * tl.exp(peak - shift) + tl.sum(tl.exp(scores - shift[:, None]), 1)
            peak = new
    if WEIGHTS:
        tl.debug_barrier()  # the bias is read by other threads than those that wrote it
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        # A row without a remainder has weights of zero.
        factor = scale / tl.where(total == 0.0, 1.0, total)
        if LEVELS:
            factor = tl.where(level >= VALUE_LEVEL, factor, 0.0)
        weights += b * w_sb + h * w_sh + wide_rows * w_sm
        for first in tl.range(0, columns, BLOCK_N):
            column = first + tl.arange(0, BLOCK_N)
            keys, keys_low = split(load_tile(k_mean + k_base, column, k_blocks, k_sm, D, BLOCK_D, True))
            inside = own & (column < k_blocks)[None, :]
            found = tl.load(bias + column[None, :], mask=inside, other=-float("inf")).to(tl.float32) + base
            scores = multiply_split(middle, middle_low, keys, keys_low, UPCAST) + found
            share = (tl.exp(scores - shift[:, None]) * factor[:, None]).to(weights.dtype.element_ty)
            tl.store(weights + column[None, :], share, mask=own & (column < columns)[None, :])
