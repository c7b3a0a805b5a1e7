"""Triton kernels: what a block's mean in place of its tokens would cost. Oracle: `remainder_errors`' path in torch.

Grids: (blocks, heads, batch), and (probe tiles x spans of key blocks, heads, batch). Tensors are `[B, H, N, D]`,
contiguous in the last dimension; offsets are `[B|1, H|1, M+1]`. Imported by its launcher when that first runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply


@triton.jit
def value_overlaps_kernel(
    v, norms, overlaps, offsets, v_sb, v_sh, v_sn, n_sb, n_sh, f_sb, f_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For the tokens of one block: |v|^2 and <v, the block's mean v>, `[B, H, N]` float32."""
    b, h, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    bounds = offsets + b * f_sb + h * f_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    v += b * v_sb + h * v_sh
    place = b * n_sb + h * n_sh
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(start, end, BLOCK_N):
        total += tl.sum(load_tile(v, first + tl.arange(0, BLOCK_N), end, v_sn, D, BLOCK_D, True).to(tl.float32), 0)
    middle = total / tl.maximum(end - start, 1).to(tl.float32)
    for first in tl.range(start, end, BLOCK_N):
        positions = first + tl.arange(0, BLOCK_N)
        values = load_tile(v, positions, end, v_sn, D, BLOCK_D, True).to(tl.float32)
        inside = positions < end
        tl.store(norms + place + positions, tl.sum(values * values, 1), mask=inside)
        tl.store(overlaps + place + positions, tl.sum(values * middle[None, :], 1), mask=inside)


@triton.jit
def remainder_error_kernel(
    means, k, norms, overlaps, errors, sums, offsets,
    m_sb, m_sh, m_sn, k_sb, k_sh, k_sn, n_sb, n_sh, e_sb, e_sh, e_sm, f_sb, f_sh, num_rows, num_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Log error and log sum of weights of `SPAN` key blocks for `BLOCK_M` probes, each with its block's own maximum."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(num_rows, BLOCK_M)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_block = tl.program_id(0) // tiles * SPAN
    probes = load_tile(means + b * m_sb + h * m_sh, rows, num_rows, m_sn, D, BLOCK_D, True)
    k += b * k_sb + h * k_sh
    place = b * n_sb + h * n_sh
    offsets += b * f_sb + h * f_sh
    written = b * e_sb + h * e_sh + rows.to(tl.int64) * e_sm
    for block in tl.range(first_block, tl.minimum(first_block + SPAN, num_blocks)):
        start, end = tl.load(offsets + block), tl.load(offsets + block + 1)
        m = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        squared = tl.zeros([BLOCK_M], tl.float32)
        cross = tl.zeros([BLOCK_M], tl.float32)
        summed = tl.zeros([BLOCK_M], tl.float32)
        of_means = 0.0
        for first in tl.range(start, end, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            inside = positions < end
            keys = load_tile(k, positions, end, k_sn, D, BLOCK_D, True)
            norm = tl.load(norms + place + positions, mask=inside, other=0.0)
            overlap = tl.load(overlaps + place + positions, mask=inside, other=0.0)
            scores = multiply(probes, tl.trans(keys), UPCAST) * scale
            summed += tl.sum(scores, 1)  # keys beyond the end are zeros
            peak = tl.maximum(m, tl.max(tl.where(inside[None, :], scores, -1e30), 1))
            weights = tl.where(inside[None, :], tl.exp2(scores - peak[:, None]), 0.0)
            kept = tl.exp2(m - peak)
            total = total * kept + tl.sum(weights, 1)
            cross = cross * kept + tl.sum(weights * overlap[None, :], 1)
            squared = squared * kept * kept + tl.sum(weights * weights * norm[None, :], 1)
            of_means += tl.sum(overlap, 0)
            m = peak
        # No mean is above the maximum, but for rounding and in an empty block.
        of_mean = tl.exp2(tl.minimum(summed / tl.maximum(end - start, 1).to(tl.float32) - m, 0.0))
        error = squared - 2.0 * of_mean * cross + of_mean * of_mean * of_means
        # In natural logs; log2 of 0 is -inf, which an empty block and one without error shall have.
        error = (tl.log2(tl.maximum(error, 0.0)) + 2.0 * m) * 0.6931471805599453
        tl.store(errors + written + block, error, mask=rows < num_rows)
        tl.store(sums + written + block, (tl.log2(total) + m) * 0.6931471805599453, mask=rows < num_rows)
