"""Triton kernels: attention that finds its own blocks, Sol-Attn's routing (arXiv 2607.24027).

A tile of scores of the block means serves twice: its mean over the queries says which key blocks stand out, and the
others attend by it as the remainder. The blocks that stand out are then listed and attended to as in
`triton_kernels.forward_kernel`. No map of scores and none of biases is written. Oracle: `routing.routed_plan`, then any
backend.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.remainder_kernels import multiply_split, split
from dit_sparse.kernels.triton_kernels import add_means, attend_kept, load_tile, multiply

# Without this every other size of a video would be compiled for its strides anew.
PLAIN_NUMBERS = [
    "qo_sb", "qo_sh", "ko_sb", "ko_sh", "n_sb", "n_sh", "z_sb", "z_sh", "f_sb", "f_sh", "f_sm", "u_sb", "u_sh", "u_sm",
    "c_sb", "c_sh", "i_sb", "i_sh", "i_sm", "run_start", "run_end", "k_size", "q_blocks", "k_blocks", "words",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def stand_in_kernel(
    square_q, square_k, forced, stand_ins, mq_sb, mq_sh, mq_sm, mk_sb, mk_sh, mk_sm, f_sb, f_sh, f_sm, u_sb, u_sh, u_sm,
    q_blocks, k_blocks, words, limit,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Which key blocks' means may stand in, a bit each; 32 key blocks for BLOCK_M query blocks.

    Those that are not `forced`, and alike: `sum over the channels of q2_I * var_j` is at most `limit`. Grid: (tiles of
    query blocks x words, heads, batch).
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) // words) * BLOCK_M + tl.arange(0, BLOCK_M)
    word = tl.program_id(0) % words
    bit = tl.arange(0, 32)
    squares, squares_low = split(
        load_tile(square_q + b * mq_sb + h * mq_sh, rows, q_blocks, mq_sm, D, BLOCK_D, True) / limit
    )
    variances, variances_low = split(
        load_tile(square_k + b * mk_sb + h * mk_sh, word * 32 + bit, k_blocks, mk_sm, D, BLOCK_D, True)
    )
    alike = multiply_split(squares, squares_low, variances, variances_low, UPCAST) <= 1.0
    must = tl.load(forced + b * f_sb + h * f_sh + rows.to(tl.int64) * f_sm + word, mask=rows < q_blocks, other=0)
    found = tl.sum(alike.to(tl.int32) << bit[None, :], 1) & ~must
    stand_ins += b * u_sb + h * u_sh + rows.to(tl.int64) * u_sm + word
    tl.store(stand_ins, found, mask=rows < q_blocks)


CHUNK = tl.constexpr(256)  # blocks that are listed at a time


@triton.jit
def bit_of(words, blocks, inside):
    """Bit `blocks` of a row of words; False where not `inside`."""
    return ((tl.load(words + blocks // 32, mask=inside, other=0) >> (blocks % 32)) & 1) != 0


@triton.jit
def list_kept(indices, chosen, forced, sizes, k_blocks):
    """Make of a row of flags, 1 where a block stands out, the list of the kept blocks in the same place.

    `chosen` gets the flags of those. Returns their number and how many keys they hold.
    """
    count = 0
    keys = 0
    # Other threads have written the flags; with one stage none is read ahead of this.
    tl.debug_barrier()
    for first in tl.range(0, k_blocks, CHUNK, num_stages=1):
        blocks = first + tl.arange(0, CHUNK)
        inside = blocks < k_blocks
        size = tl.load(sizes + blocks, mask=inside, other=0)
        flags = tl.load(indices + blocks, mask=inside, other=0)
        kept = ((flags != 0) | bit_of(forced, blocks, inside)) & (size > 0)
        place = tl.cumsum(kept.to(tl.int32), 0)
        # No entry stands behind the flag that it comes from, so only flags that all have read are written over.
        tl.debug_barrier()
        tl.store(indices + count + place - 1, blocks, mask=kept)
        tl.store(chosen + blocks, kept.to(tl.uint8), mask=inside)
        count += tl.max(place, 0)
        keys += tl.sum(tl.where(kept, size, 0), 0)
    tl.debug_barrier()
    return count, keys


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def routed_kernel(
    q, k, v, out, mean_k, mean_v, needed, sizes, forced, stand_ins, q_offsets, k_offsets, counts, pairs, indices,
    chosen, q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn, mk_sb, mk_sh, mk_sm,
    mv_sb, mv_sh, mv_sm, n_sb, n_sh, z_sb, z_sh, f_sb, f_sh, f_sm, u_sb, u_sh, u_sm, qo_sb, qo_sh, ko_sb, ko_sh,
    c_sb, c_sh, i_sb, i_sh, i_sm, run_start, run_end, k_size, k_blocks, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, K_TILES: tl.constexpr, TILE: tl.constexpr, MEANS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output, list of kept blocks and number of kept pairs of one query block, which is one tile.

    Args:
        mean_k, mean_v: `[B, H, Mk, D]`, `[B, H, Mk, DV]` means in the tokens' dtype.
        needed: `[B, H, Mq]` float32, the mean product above which a key block stands out.
        sizes: `[B|1, H|1, Mk]` int32 tokens a key block.
        forced: `[B|1, H|1, Mq, ceil(Mk/32)]` int32, a bit for each block that is kept whatever it scores.
        stand_ins: `[B, H, Mq, ceil(Mk/32)]` int32, of `stand_in_kernel`.
        counts, pairs, indices: `[B, H, Mq]`, `[B, H, Mq]`, `[B, H, Mq, Mk]` int32, filled here.
        chosen: `[B, H, Mq, Mk]` uint8, 1 where a block is kept, filled here; strides as of `indices`.
        scale: of the scores, in base 2; above 0.

    The other arguments are as in `forward_kernel`. Grid: (query blocks, heads, batch).
    """
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    block = tl.program_id(0)
    bounds = q_offsets + b * qo_sb + h * qo_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    counts += b * c_sb + h * c_sh + block
    pairs += b * c_sb + h * c_sh + block
    i_row = b * i_sb + h * i_sh + block.to(tl.int64) * i_sm
    if start >= end:
        tl.store(counts, 0)
        tl.store(pairs, 0)
        for first in tl.range(0, k_blocks, CHUNK):
            blocks = first + tl.arange(0, CHUNK)
            tl.store(chosen + i_row + blocks, tl.zeros([CHUNK], tl.uint8), mask=blocks < k_blocks)
        return
    rows = start + tl.arange(0, BLOCK_M)
    queries = load_tile(q + b * q_sb + h * q_sh, rows, end, q_sn, D, BLOCK_D, True)
    # Of the sum over the rows; those past the end are zeros.
    bar = tl.load(needed + b * n_sb + h * n_sh + block) * (end - start).to(tl.float32)
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    k_offsets += b * ko_sb + h * ko_sh
    mean_k += b * mk_sb + h * mk_sh
    mean_v += b * mv_sb + h * mv_sh
    sizes += b * z_sb + h * z_sh
    forced += b * f_sb + h * f_sh + block.to(tl.int64) * f_sm
    stand_ins += b * u_sb + h * u_sh + block.to(tl.int64) * u_sm
    indices += i_row
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    tail = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for first in tl.range(0, k_blocks, TILE, num_stages=2):
        blocks = first + tl.arange(0, TILE)
        inside = blocks < k_blocks
        products = multiply(queries, tl.trans(load_tile(mean_k, blocks, k_blocks, mk_sm, D, BLOCK_D, True)), UPCAST)
        stands_out = tl.sum(products, 0) > bar
        tl.store(indices + blocks, stands_out.to(tl.int32), mask=inside)
        if MEANS:
            size = tl.load(sizes + blocks, mask=inside, other=0)
            stands_in = (stands_out == 0) & (size > 0) & bit_of(stand_ins, blocks, inside)
            bias = tl.where(stands_in, tl.log2(tl.maximum(size, 1).to(tl.float32)), -float("inf"))
            m, total, tail, acc = add_means(
                products * scale + bias[None, :], m, total, tail, acc, mean_v, blocks, k_blocks, mv_sm,
                DV, BLOCK_DV, UPCAST,
            )  # fmt: skip
    count, keys = list_kept(indices, chosen + i_row, forced, sizes, k_blocks)
    tl.store(counts, count)
    tl.store(pairs, keys * (end - start))
    m, total, acc = attend_kept(
        queries, m, total, acc, k, v, indices, count, k_offsets, run_start, run_end, k_size, k_sn, v_sn, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, UPCAST,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    v_channels = tl.arange(0, BLOCK_DV)
    pointers = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sn + v_channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (v_channels < DV)[None, :])
