"""Triton kernels of a remainder: the moments of blocks, from them each block's bias, and its share in a matrix C.

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
def load_block_bounds(offsets, block, run_origin, largest, run_start, run_end):
    """Where a block begins and ends. In the even run that is reckoned, as a load would have to come first."""
    uneven = (block < run_start) | (block >= run_end)
    reckoned = run_origin + block * largest
    start = tl.where(uneven, tl.load(offsets + block, mask=uneven, other=0), reckoned)
    end = tl.where(uneven, tl.load(offsets + block + 1, mask=uneven, other=0), reckoned + largest)
    return start, end


@triton.jit
def load_run_origin(offsets, largest, run_start):
    return tl.load(offsets + run_start, mask=run_start > 0, other=0) - run_start * largest


@triton.jit
def sums_kernel(
    x, v, mean, square, v_mean, rounded, v_rounded, offsets,
    x_sb, x_sh, x_sn, v_sb, v_sh, v_sn, m_sb, m_sh, m_sm, vm_sb, vm_sh, vm_sm, f_sb, f_sh,
    blocks, largest, run_start, run_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, CENTRED: tl.constexpr, VALUES: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Moments of a block without products, by one warp, which needs no other to add up. Grid: (blocks, heads, batch).

    Squares are taken around the block's first token, so that a mean far from zero takes no digits from a variance.
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    offsets += b * f_sb + h * f_sh
    run_origin = load_run_origin(offsets, largest, run_start)
    start, end = load_block_bounds(offsets, block, run_origin, largest, run_start, run_end)
    x += b * x_sb + h * x_sh + start.to(tl.int64) * x_sn
    v += b * v_sb + h * v_sh + start.to(tl.int64) * v_sn
    size = end - start
    channels = tl.arange(0, BLOCK_D)
    v_channels = tl.arange(0, BLOCK_DV)
    rows = tl.arange(0, BLOCK_N)
    origin = tl.zeros([BLOCK_D], tl.float32)
    if CENTRED:
        origin = tl.load(x + channels, mask=channels < tl.where(size > 0, D, 0), other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    squares = tl.zeros([BLOCK_D], tl.float32)
    v_total = tl.zeros([BLOCK_DV], tl.float32)
    for first in tl.range(0, size, BLOCK_N * PARTS):
        for part in tl.static_range(PARTS):
            positions = first + part * BLOCK_N + rows
            tokens = load_tile(x, positions, size, x_sn, D, BLOCK_D, True).to(tl.float32)
            total += tl.sum(tokens, 0)
            apart = tl.where((positions < size)[:, None], tokens - origin[None, :], 0.0)
            squares += tl.sum(apart * apart, 0)
            if VALUES:
                v_total += tl.sum(load_tile(v, positions, size, v_sn, DV, BLOCK_DV, True).to(tl.float32), 0)
    count = tl.maximum(size, 1).to(tl.float32)
    middle = total / count
    squares /= count
    if CENTRED:
        squares = tl.maximum(squares - (middle - origin) * (middle - origin), 0.0)
    row = b * m_sb + h * m_sh + block * m_sm
    store_row(mean + row, middle, channels, D)
    store_row(square + row, squares, channels, D)
    if ROUNDED:
        store_row(rounded + row, middle, channels, D)
    if VALUES:
        v_row = b * vm_sb + h * vm_sh + block * vm_sm
        store_row(v_mean + v_row, v_total / count, v_channels, DV)
        if ROUNDED:
            store_row(v_rounded + v_row, v_total / count, v_channels, DV)


@triton.jit
def add_tile(
    x, v, positions, end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One more tile of tokens in the sums: of `x`, of the square of `x - origin`, of values, of products `x^T v`."""
    tokens = load_tile(x, positions, end, x_sn, D, BLOCK_D, True)
    wide = tokens.to(tl.float32)
    total += tl.sum(wide, 0)
    apart = tl.where((positions < end)[:, None], wide - origin[None, :], 0.0)
    squares += tl.sum(apart * apart, 0)
    v_channels = tl.arange(0, BLOCK_DV)
    inside = (positions < end)[:, None] & (v_channels < v_end)[None, :]
    pointers = v + positions.to(tl.int64)[:, None] * v_sn + v_channels[None, :]
    values = tl.load(pointers, mask=inside, other=0.0)
    v_total += tl.sum(values.to(tl.float32), 0)
    acc += multiply(tl.trans(tokens), values, UPCAST)
    return total, squares, v_total, acc


@triton.jit
def products_kernel(
    x, v, mean, square, v_mean, rounded, v_rounded, products, offsets,
    x_sb, x_sh, x_sn, v_sb, v_sh, v_sn, m_sb, m_sh, m_sm, vm_sb, vm_sh, vm_sm, p_sb, p_sh, p_sm, p_sd, f_sb, f_sh,
    blocks, largest, run_start, run_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, SINGLE: tl.constexpr, ROUNDED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Moments of SPAN blocks with products; BLOCK_DV channels of the values. Every token is read once.

    Grid: (spans x tiles of value channels, heads, batch).
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    first_block, part = (tl.program_id(0) // PARTS) * SPAN, tl.program_id(0) % PARTS
    offsets += b * f_sb + h * f_sh
    channels = tl.arange(0, BLOCK_D)
    v_channels = tl.arange(0, BLOCK_DV)
    x += b * x_sb + h * x_sh
    v += b * v_sb + h * v_sh + part * BLOCK_DV
    products += b * p_sb + h * p_sh + part * BLOCK_DV
    v_end = DV - part * BLOCK_DV
    run_origin = load_run_origin(offsets, largest, run_start)
    for number in tl.range(0, tl.minimum(SPAN, blocks - first_block)):
        block = (first_block + number).to(tl.int64)
        start, end = load_block_bounds(offsets, block, run_origin, largest, run_start, run_end)
        inside = channels < tl.where(start < end, D, 0)
        origin = tl.load(x + start * x_sn + channels, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_D], tl.float32)
        squares = tl.zeros([BLOCK_D], tl.float32)
        v_total = tl.zeros([BLOCK_DV], tl.float32)
        acc = tl.zeros([BLOCK_D, BLOCK_DV], tl.float32)
        if SINGLE:
            total, squares, v_total, acc = add_tile(
                x, v, start + tl.arange(0, BLOCK_N), end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
                D, BLOCK_D, BLOCK_DV, UPCAST,
            )  # fmt: skip
        else:
            for first in tl.range(start, end, BLOCK_N):
                total, squares, v_total, acc = add_tile(
                    x, v, first + tl.arange(0, BLOCK_N), end, origin, x_sn, v_sn, v_end, total, squares, v_total, acc,
                    D, BLOCK_D, BLOCK_DV, UPCAST,
                )  # fmt: skip
        count = tl.maximum(end - start, 1).to(tl.float32)
        middle, v_middle = total / count, v_total / count
        squares = tl.maximum(squares / count - (middle - origin) * (middle - origin), 0.0)
        row = b * m_sb + h * m_sh + block * m_sm
        v_row = b * vm_sb + h * vm_sh + block * vm_sm + part * BLOCK_DV
        store_row(mean + row, middle, channels, D)
        store_row(square + row, squares, channels, D)
        store_row(v_mean + v_row, v_middle, v_channels, v_end)
        if ROUNDED:
            store_row(rounded + row, middle, channels, D)
            store_row(v_rounded + v_row, v_middle, v_channels, v_end)
        # The mean of (x - mean)^T v is that of x^T v less the product of the means.
        found = acc / count - middle[:, None] * v_middle[None, :]
        if products.dtype.element_ty == tl.float16:
            # An infinity of one block would make NaN of every sum of blocks.
            found = tl.where(tl.abs(found) > 65504.0, tl.where(found > 0.0, 65504.0, -65504.0), found)
        pointers = products + block * p_sm + channels[:, None] * p_sd + v_channels[None, :]
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
    q_mean, q_square, k_mean, k_square, kept, k_offsets, levels, bias, scores,
    q_sb, q_sh, q_sm, k_sb, k_sh, k_sm, t_sb, t_sh, t_sm, f_sb, f_sh, l_sb, l_sh, b_sb, b_sh, b_sm, s_sb, s_sh, s_sm,
    q_blocks, k_blocks, columns, scale, largest_spread, base,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASS: tl.constexpr,
    SCORES: tl.constexpr, LEVELS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bias of BLOCK_N blocks' means for BLOCK_M query blocks, and (SCORES) with it the score of the mean query.

    A row of the bias has `columns`, -inf past the last block. Grid: (tiles of query blocks x tiles of columns, heads,
    batch). Heads may have (LEVELS) a remainder of their own, by its place in `REMAINDERS`.
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    k_tiles = tl.cdiv(columns, BLOCK_N)
    rows = (tl.program_id(0) // k_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % k_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < k_blocks
    both = (rows < q_blocks)[:, None] & inside[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    q_base = b * q_sb + h * q_sh
    k_base = b * k_sb + h * k_sh
    squares = load_tile(q_square + q_base, rows, q_blocks, q_sm, D, BLOCK_D, True) * (scale * scale / 2)
    squares, squares_low = split(squares)
    variances, variances_low = split(load_tile(k_square + k_base, column, k_blocks, k_sm, D, BLOCK_D, True))
    spread = multiply_split(squares, squares_low, variances, variances_low, UPCAST)
    k_offsets += b * f_sb + h * f_sh + column
    sizes = tl.load(k_offsets + 1, mask=inside, other=0) - tl.load(k_offsets, mask=inside, other=0)
    logs = tl.where(sizes > 0, tl.log(tl.maximum(sizes, 1).to(tl.float32)), -float("inf"))[None, :]
    hidden = tl.load(kept + b * t_sb + h * t_sh + wide_rows * t_sm + column[None, :], mask=both, other=1) != 0
    hidden = hidden | (spread > largest_spread)
    found = logs + tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if LEVELS:
        level = tl.load(levels + b * l_sb + h * l_sh)
        hidden = hidden | (level < MEAN_LEVEL)
    if MASS:
        larger = tl.minimum(spread, logs)
        found += tl.where(level >= MASS_LEVEL, larger, 0.0) if LEVELS else larger
    found = tl.where(hidden, -float("inf"), found)
    bias += b * b_sb + h * b_sh + wide_rows * b_sm + column[None, :]
    tl.store(bias, (found - base).to(bias.dtype.element_ty), mask=(rows < q_blocks)[:, None] & (column < columns)[None])
    if SCORES:
        middle, middle_low = split(load_tile(q_mean + q_base, rows, q_blocks, q_sm, D, BLOCK_D, True) * scale)
        keys, keys_low = split(load_tile(k_mean + k_base, column, k_blocks, k_sm, D, BLOCK_D, True))
        found += multiply_split(middle, middle_low, keys, keys_low, UPCAST)
        tl.store(scores + b * s_sb + h * s_sh + wide_rows * s_sm + column[None, :], found, mask=both)


@triton.jit
def share_kernel(
    scores, levels, weights, s_sb, s_sh, s_sm, l_sb, l_sh, w_sb, w_sh, w_sm, q_blocks, k_blocks, columns, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """`scale` times the softmax of BLOCK_M rows of scores. Grid: (tiles of query blocks, heads, batch).

    `weights` have `columns` of them, `k_blocks` or more, and hold zeros past the last block, in a row without a
    remainder, and in heads whose own is below "value".
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = (rows < q_blocks)[:, None]
    wide_rows = rows.to(tl.int64)[:, None]
    scores += b * s_sb + h * s_sh + wide_rows * s_sm
    weights += b * w_sb + h * w_sh + wide_rows * w_sm
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, k_blocks, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)[None, :]
        found = tl.load(scores + column, mask=own & (column < k_blocks), other=-float("inf"))
        new = tl.maximum(peak, tl.max(found, 1))
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp(peak - shift) + tl.sum(tl.exp(found - shift[:, None]), 1)
        peak = new
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    factor = scale / tl.where(total == 0.0, 1.0, total)
    if LEVELS:
        factor = tl.where(tl.load(levels + b * l_sb + h * l_sh) >= VALUE_LEVEL, factor, 0.0)
    for first in tl.range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)[None, :]
        found = tl.load(scores + column, mask=own & (column < k_blocks), other=-float("inf"))
        share = tl.exp(found - shift[:, None]) * factor[:, None]
        tl.store(weights + column, share.to(weights.dtype.element_ty), mask=own & (column < columns))
