"""Triton kernel: attention that finds its own blocks, Sol-Attn's routing (arXiv 2607.24027).

A tile of scores of the block means serves twice: its mean over the queries says which key blocks stand out, and the
others attend by it as the remainder. The blocks that stand out are listed on the way, and then attended to as in
`triton_kernels.forward_kernel`. No map of scores and none of biases is written. Oracle: `routing.routed_plan`, then any
backend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import add_means, attend_kept, load_tile, multiply


@triton.jit
def spread_of(square, q_square, blocks, num_blocks, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`sum over the channels of q2_I * var_j` of a tile of key blocks."""
    return tl.sum(load_tile(square, blocks, num_blocks, stride, D, BLOCK_D, True) * q_square[None, :], 1)


# Without this every other size of a video would be compiled for its strides anew.
PLAIN_NUMBERS = [
    "qo_sb", "qo_sh", "ko_sb", "ko_sh", "n_sb", "n_sh", "f_sb", "f_sh", "f_sm", "c_sb", "c_sh", "i_sb", "i_sh", "i_sm",
    "run_start", "run_end", "k_size", "num_k_blocks",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def routed_kernel(
    q, k, v, out, mean_k, square_k, mean_v, square_q, needed, forced, q_offsets, k_offsets, counts, pairs, indices,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn,
    mk_sb, mk_sh, mk_sm, mv_sb, mv_sh, mv_sm, mq_sb, mq_sh, mq_sm, n_sb, n_sh, f_sb, f_sh, f_sm,
    qo_sb, qo_sh, ko_sb, ko_sh, c_sb, c_sh, i_sb, i_sh, i_sm, run_start, run_end, k_size, num_k_blocks, scale, limit,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, K_TILES: tl.constexpr, TILE: tl.constexpr, MEANS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output, list of kept blocks and number of kept pairs of one query block, which is one tile.

    Args:
        mean_k, mean_v: `[B, H, Mk, D]`, `[B, H, Mk, DV]` means in the tokens' dtype.
        square_k, square_q: `[B, H, M, D]` float32, variance of the keys and mean square of the queries.
        needed: `[B, H, Mq]` float32, the mean product above which a key block stands out.
        forced: `[B|1, H|1, Mq, Mk]` uint8, blocks that are kept whatever they score.
        counts, pairs, indices: `[B, H, Mq]`, `[B, H, Mq]`, `[B, H, Mq, Mk]` int32, filled here.
        scale: of the scores, in base 2; above 0.
        limit: of `spread_of`; above it a block leaves no remainder.

    The other arguments are as in `forward_kernel`. Grid: (query blocks, heads, batch).
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    bounds = q_offsets + b * qo_sb + h * qo_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    counts += b * c_sb + h * c_sh + block
    pairs += b * c_sb + h * c_sh + block
    if start >= end:
        tl.store(counts, 0)
        tl.store(pairs, 0)
        return
    rows = start + tl.arange(0, BLOCK_M)
    queries = load_tile(q + b * q_sb + h * q_sh, rows, end, q_sn, D, BLOCK_D, True)
    channels = tl.arange(0, BLOCK_D)
    q_row = b * mq_sb + h * mq_sh + block.to(tl.int64) * mq_sm
    q_square = tl.load(square_q + q_row + channels, mask=channels < D, other=0.0)
    # Of the sum over the rows; those past the end are zeros.
    bar = tl.load(needed + b * n_sb + h * n_sh + block) * (end - start).to(tl.float32)
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    k_offsets += b * ko_sb + h * ko_sh
    mean_k += b * mk_sb + h * mk_sh
    square_k += b * mk_sb + h * mk_sh
    mean_v += b * mv_sb + h * mv_sh
    forced += b * f_sb + h * f_sh + block.to(tl.int64) * f_sm
    indices += b * i_sb + h * i_sh + block.to(tl.int64) * i_sm
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tail = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    count = 0
    keys = 0
    # Variances are float32, so more stages or a larger TILE would not fit in shared memory.
    for first in tl.range(0, num_k_blocks, TILE, num_stages=2):
        blocks = first + tl.arange(0, TILE)
        inside = blocks < num_k_blocks
        sizes = tl.load(k_offsets + blocks + 1, mask=inside, other=0) - tl.load(
            k_offsets + blocks, mask=inside, other=0
        )
        products = multiply(queries, tl.trans(load_tile(mean_k, blocks, num_k_blocks, mk_sm, D, BLOCK_D, True)), UPCAST)
        kept = (tl.load(forced + blocks, mask=inside, other=0) != 0) | (tl.sum(products, 0) > bar)
        kept = kept & (sizes > 0)
        ones = kept.to(tl.int32)
        tl.store(indices + count + tl.cumsum(ones, 0) - 1, blocks, mask=kept)
        count += tl.sum(ones, 0)
        keys += tl.sum(tl.where(kept, sizes, 0), 0)
        if MEANS:
            spread = spread_of(square_k, q_square, blocks, num_k_blocks, mk_sm, D, BLOCK_D)
            stands_in = (kept == 0) & (sizes > 0) & ((spread > limit) == 0)
            bias = tl.where(stands_in, tl.log2(tl.maximum(sizes, 1).to(tl.float32)), -float("inf"))
            m, total, tail, acc = add_means(
                products * scale + bias[None, :], m, total, tail, acc, mean_v, blocks, num_k_blocks, mv_sm,
                DV, BLOCK_DV, UPCAST,
            )  # fmt: skip
    tl.store(counts, count)
    tl.store(pairs, keys * (end - start))
    # The list has been written by other threads than those that read it.
    tl.debug_barrier()
    m, total, acc = attend_kept(
        queries, m, total, acc, k, v, indices, count, k_offsets, run_start, run_end, k_size, k_sn, v_sn, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, UPCAST,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    v_channels = tl.arange(0, BLOCK_DV)
    pointers = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sn + v_channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (v_channels < DV)[None, :])
