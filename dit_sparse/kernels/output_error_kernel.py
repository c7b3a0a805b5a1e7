"""Triton kernel: what a block's mean in place of its tokens would change. Oracle: `output_errors`' path in torch.

Grid: (probe tiles x spans of key blocks, heads, batch). Tensors are `[B, H, N, D]`, contiguous in the last dimension;
all heads share the offsets `[1, 1, M+1]`. Imported by its launcher when that first runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def output_error_kernel(
    q, out, lse, k, v, middle, bias, errors, offsets,
    q_sb, q_sh, q_sn, o_sb, o_sh, o_sn, l_sb, l_sh, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn,
    m_sb, m_sh, m_sn, b_sb, b_sh, b_sm, e_sb, e_sh, e_sm, num_rows, num_blocks, scale, rows_a_block,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPAN: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Squared errors of `BLOCK_M` probes with `out` and `lse`, and `SPAN` key blocks of mean values `middle`."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(num_rows, BLOCK_M)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    first_block = tl.program_id(0) // tiles * SPAN
    inside_rows = rows < num_rows
    probes = load_tile(q + b * q_sb + h * q_sh, rows, num_rows, q_sn, D, BLOCK_D, True)
    attended = load_tile(out + b * o_sb + h * o_sh, rows, num_rows, o_sn, DV, BLOCK_DV, True).to(tl.float32)
    sums = tl.load(lse + b * l_sb + h * l_sh + rows, mask=inside_rows, other=0.0)
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    middle += b * m_sb + h * m_sh
    biases = bias + b * b_sb + h * b_sh + (rows // rows_a_block).to(tl.int64) * b_sm
    written = errors + b * e_sb + h * e_sh + rows.to(tl.int64) * e_sm
    channels = tl.arange(0, BLOCK_DV)
    for block in tl.range(first_block, tl.minimum(first_block + SPAN, num_blocks)):
        start, end = tl.load(offsets + block), tl.load(offsets + block + 1)
        change = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        summed = tl.zeros([BLOCK_M], tl.float32)
        for first in tl.range(start, end, BLOCK_N):
            positions = first + tl.arange(0, BLOCK_N)
            keys = load_tile(k, positions, end, k_sn, D, BLOCK_D, True)
            scores = multiply(probes, tl.trans(keys), UPCAST) * scale
            summed += tl.sum(scores, 1)  # keys beyond the end are zeros
            weights = tl.where((positions < end)[None, :], tl.exp2((scores - sums[:, None]) * _LOG2_E), 0.0)
            total += tl.sum(weights, 1)
            values = load_tile(v, positions, end, v_sn, DV, BLOCK_DV, True)
            change += multiply(weights.to(values.dtype), values, UPCAST)
        # The mean of the scores is the score of the mean.
        of_mean = summed / tl.maximum(end - start, 1).to(tl.float32)
        size = tl.load(biases + block, mask=inside_rows, other=0.0)
        a = tl.exp2((of_mean + size - sums) * _LOG2_E)
        mean = tl.load(middle + block * m_sn + channels, mask=channels < DV, other=0.0)
        change += -a[:, None] * mean[None, :] - (total - a)[:, None] * attended
        tl.store(written + block, tl.sum(change * change, 1), mask=inside_rows)
