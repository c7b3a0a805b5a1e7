"""Triton kernel: what a block's mean in place of its tokens would change. Oracle: `output_errors`' path in torch.

For queries of weights p, output o, and a block j of B tokens with mean key k_j and a = B exp(s q.k_j - lse),

    sum over t in j of p_t (v_t - o) - a (v_j - o)  =  sum over t in j of d_t v_t - (sum of d_t) o,  d_t = p_t - a / B,

so that the means of the values are not needed, and the mean of a block's scores is the score of its mean.

Grid: (probe tiles x spans of key blocks, heads, batch). Tensors are `[B, H, N, D]`, contiguous in the last dimension;
all heads share the offsets `[1, 1, M+1]`. Imported by its launcher when that first runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def score_tile(probes, k, positions, end, k_sn, D: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """`q K^T` of a tile of keys; zeros from `end` on."""
    return multiply(probes, tl.trans(load_tile(k, positions, end, k_sn, D, BLOCK_D, True)), UPCAST)


@triton.jit
def output_error_kernel(
    q, out, lse, k, v, spread, errors, q_offsets, k_offsets,
    q_sb, q_sh, q_sn, o_sb, o_sh, o_sn, l_sb, l_sh, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, s_sb, s_sh, s_sm,
    e_sb, e_sh, e_sm, num_q_blocks, num_blocks, num_rows, scale, largest_spread,
    SLOTS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, SINGLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Squared errors of a tile of probes with `out` and `lse`, summed by query block, and of `SPAN` key blocks.

    A query block has `num_rows` probes in `SLOTS` slots, a power of two. Key blocks of one tile (SINGLE) are read once;
    of larger ones the scores come twice, first for their mean.
    """
    GROUP: tl.constexpr = BLOCK_M // SLOTS if SLOTS < BLOCK_M else 1
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles = tl.cdiv(num_q_blocks * SLOTS, BLOCK_M)
    tile = tl.program_id(0) % tiles
    first_block = tl.program_id(0) // tiles * SPAN
    end_block = tl.minimum(first_block + SPAN, num_blocks)
    slots = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q_block = slots // SLOTS
    inside = (slots % SLOTS < num_rows) & (q_block < num_q_blocks)
    rows = tl.where(inside, q_block * num_rows + slots % SLOTS, 0)
    probes = load_tile(q + b * q_sb + h * q_sh, rows, 1 << 30, q_sn, D, BLOCK_D, False)
    attended = load_tile(out + b * o_sb + h * o_sh, rows, 1 << 30, o_sn, DV, BLOCK_DV, False).to(tl.float32)
    # The weights of slots without a probe are zeros.
    sums = tl.load(lse + b * l_sb + h * l_sh + rows, mask=inside, other=float("inf")) * _LOG2_E
    scale *= _LOG2_E
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    spreads = spread + b * s_sb + h * s_sh + tl.minimum(q_block, num_q_blocks - 1).to(tl.int64) * s_sm
    written = tile * GROUP + tl.arange(0, GROUP)
    of_block = tl.minimum(written // (SLOTS // (BLOCK_M // GROUP)), num_q_blocks - 1)
    share = (tl.load(q_offsets + of_block + 1) - tl.load(q_offsets + of_block)).to(tl.float32) / num_rows
    exists = written < tl.cdiv(num_q_blocks * SLOTS, BLOCK_M // GROUP)
    errors += b * e_sb + h * e_sh + written.to(tl.int64) * e_sm
    # Where the next tile lies is read a step ahead: copies that wait for another load are not pipelined.
    start, end = tl.load(k_offsets + first_block), tl.load(k_offsets + first_block + 1)
    for block in tl.range(first_block, end_block):
        following = k_offsets + tl.minimum(block + 1, num_blocks - 1)
        next_start, next_end = tl.load(following), tl.load(following + 1)
        has_mean = tl.load(spreads + block) <= largest_spread
        size = tl.maximum(end - start, 1).to(tl.float32)
        if SINGLE:
            positions = start + tl.arange(0, BLOCK_N)
            scores = score_tile(probes, k, positions, end, k_sn, D, BLOCK_D, UPCAST) * scale
            a = tl.where(has_mean, tl.exp2(tl.sum(scores, 1) / size - sums), 0.0)
            weights = tl.exp2(scores - sums[:, None]) - a[:, None]
            weights = tl.where((positions < end)[None, :], weights, 0.0)
            total = tl.sum(weights, 1)
            values = load_tile(v, positions, end, v_sn, DV, BLOCK_DV, True)
            change = multiply(weights.to(values.dtype), values, UPCAST)
        else:
            total = tl.zeros([BLOCK_M], tl.float32)
            change = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
            summed = tl.zeros([BLOCK_M], tl.float32)
            for first in tl.range(start, end, BLOCK_N):
                positions = first + tl.arange(0, BLOCK_N)
                summed += tl.sum(score_tile(probes, k, positions, end, k_sn, D, BLOCK_D, UPCAST), 1)
            a = tl.where(has_mean, tl.exp2(summed * scale / size - sums), 0.0)
            for first in tl.range(start, end, BLOCK_N):
                positions = first + tl.arange(0, BLOCK_N)
                scores = score_tile(probes, k, positions, end, k_sn, D, BLOCK_D, UPCAST) * scale
                weights = tl.exp2(scores - sums[:, None]) - a[:, None]
                weights = tl.where((positions < end)[None, :], weights, 0.0)
                total += tl.sum(weights, 1)
                values = load_tile(v, positions, end, v_sn, DV, BLOCK_DV, True)
                change += multiply(weights.to(values.dtype), values, UPCAST)
        change -= total[:, None] * attended
        squares = tl.reshape(tl.sum(change * change, 1), [GROUP, BLOCK_M // GROUP])
        tl.store(errors + block, tl.sum(squares, 1) * share, mask=exists)
        start, end = next_start, next_end
