"""Triton kernel: attention that skips blocks whose scores are all far below the running maximum.

`skip_kernel` is `triton_kernels.forward_kernel` without a remainder, and its grid and layouts are the same; but one
tile is one block of the plan, whole blocks go by in the plan's order, and a block that no row of the query block needs
is left as soon as its scores are there: no exponential, no load of values, no product with them. Oracle:
`skip.without_skipped`. Source: BLASST (arXiv 2512.12087), algorithm 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import allowed_pairs, load_tile, multiply, plain_entries, score_tile


@triton.jit
def attend_needed(
    q, m, total, acc, skipped, k, v, start, end, inside, num_rows, k_stride, v_stride, scale, floor, allowed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """As `attend_tile` where a row `inside` has a score of `floor` below its maximum or more; else `skipped` pairs."""
    positions = start + tl.arange(0, BLOCK_N)
    scores = score_tile(q, k, positions, end, k_stride, allowed, D, BLOCK_D, MASKED, PARTIAL, UPCAST)
    peak = tl.max(scores, 1) * scale
    # Not `>=`: a NaN is needed, so that it is seen.
    needed = inside & ((peak < m + floor) == 0)
    if tl.max(needed.to(tl.int32), 0) > 0:
        peak = tl.maximum(m, peak)
        shift = peak
        if MASKED or PARTIAL:
            # A row that has seen no key yet: -inf less -inf would be NaN.
            shift = tl.where(peak == -float("inf"), 0.0, peak)
        weights = tl.exp2(scores * scale - shift[:, None])
        keep = tl.exp2(m - shift)
        values = load_tile(v, positions, end, v_stride, DV, BLOCK_DV, MASKED)
        acc = acc * keep[:, None] + multiply(weights.to(values.dtype), values, UPCAST)
        total = total * keep + tl.sum(weights, 1)
        m = peak
    elif PARTIAL:
        pairs = allowed & inside[:, None] & (positions < end)[None, :]
        skipped += tl.sum(tl.sum(pairs.to(tl.int32), 1), 0)
    else:
        skipped += (end - start) * num_rows
    return m, total, acc, skipped


# Without this every other mask or batch size would be compiled for its strides anew.
PLAIN_NUMBERS = [
    "lse_sb", "lse_sh", "s_sb", "s_sh", "qo_sb", "qo_sh", "ko_sb", "ko_sh", "c_sb", "c_sh", "i_sb", "i_sh", "i_sm",
    "pc_sb", "pc_sh", "pi_sb", "pi_sh", "pi_sm", "bits_sb", "bits_sh", "bits_sm", "bits_sl", "words", "q_block",
    "run_start", "run_end",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def skip_kernel(
    q, k, v, out, lse, skips,
    q_offsets, k_offsets, counts, indices, partial_counts, partial_indices, bits,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn, lse_sb, lse_sh, s_sb, s_sh,
    qo_sb, qo_sh, ko_sb, ko_sh, c_sb, c_sh, i_sb, i_sh, i_sm, pc_sb, pc_sh, pi_sb, pi_sh, pi_sm,
    bits_sb, bits_sh, bits_sm, bits_sl, words, q_block, run_start, run_end, scale, floor,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PARTIAL: tl.constexpr, RETURN_LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output, row sums and skipped pairs of one query block."""
    b, h, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0)
    bounds = q_offsets + b * qo_sb + h * qo_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    if start >= end:
        return
    rows = start + tl.arange(0, BLOCK_M)
    inside, num_rows = rows < end, end - start
    queries = load_tile(q + b * q_sb + h * q_sh, rows, end, q_sn, D, BLOCK_D, True)
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    k_offsets += b * ko_sb + h * ko_sh
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    skipped = 0

    count = tl.load(counts + b * c_sb + h * c_sh + block)
    indices += b * i_sb + h * i_sh + block * i_sm
    last = tl.maximum(count - 1, 0)
    plain_start, plain_end = plain_entries(indices, count, run_start, run_end)
    for i in tl.range(0, plain_start, num_stages=1):
        bound = k_offsets + tl.load(indices + i)
        m, total, acc, skipped = attend_needed(
            queries, m, total, acc, skipped, k, v, tl.load(bound), tl.load(bound + 1), inside, num_rows, k_sn, v_sn,
            scale, floor, None, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, UPCAST,
        )  # fmt: skip
    origin = tl.load(k_offsets + run_start) - run_start * BLOCK_N
    k_start = origin + tl.load(indices + tl.minimum(plain_start, last)) * BLOCK_N
    for i in tl.range(plain_start, plain_end):
        # Where the next block lies is read a step ahead: copies that wait for another load are not pipelined.
        following = origin + tl.load(indices + tl.minimum(i + 1, last)) * BLOCK_N
        m, total, acc, skipped = attend_needed(
            queries, m, total, acc, skipped, k, v, k_start, k_start + BLOCK_N, inside, num_rows, k_sn, v_sn, scale,
            floor, None, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, False, UPCAST,
        )  # fmt: skip
        k_start = following
    for i in tl.range(plain_end, count, num_stages=1):
        bound = k_offsets + tl.load(indices + i)
        m, total, acc, skipped = attend_needed(
            queries, m, total, acc, skipped, k, v, tl.load(bound), tl.load(bound + 1), inside, num_rows, k_sn, v_sn,
            scale, floor, None, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, UPCAST,
        )  # fmt: skip
    if PARTIAL:
        count = tl.load(partial_counts + b * pc_sb + h * pc_sh + block)
        partial_indices += b * pi_sb + h * pi_sh + block * pi_sm
        bits += b * bits_sb + h * bits_sh + block * bits_sm
        for i in tl.range(0, count):
            bound = k_offsets + tl.load(partial_indices + i)
            allowed = allowed_pairs(bits + i * bits_sl, tl.arange(0, BLOCK_M), 0, q_block, words, BLOCK_M, BLOCK_N)
            m, total, acc, skipped = attend_needed(
                queries, m, total, acc, skipped, k, v, tl.load(bound), tl.load(bound + 1), inside, num_rows, k_sn,
                v_sn, scale, floor, allowed, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, True, UPCAST,
            )  # fmt: skip

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    channels = tl.arange(0, BLOCK_DV)
    pointers = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sn + channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=inside[:, None] & (channels < DV)[None, :])
    tl.store(skips + b * s_sb + h * s_sh + block, skipped)
    if RETURN_LSE:
        sums = tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
        tl.store(lse + b * lse_sb + h * lse_sh + rows, sums, mask=inside)
