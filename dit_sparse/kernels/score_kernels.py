"""Triton kernels that score and select blocks.

`block_mass_kernel`: mass of every block = sum of exp(scale * q k - lse). Oracle: `block_mass`'s path in plain torch.

`antidiagonal_kernel`: block sums of a softmax over strided antidiagonal sums of q k^T (XAttention, arXiv 2503.16428).
Oracle: `antidiagonal_scores`' path in plain torch.

`pooled_kernel`: mean of every block's tokens. Oracle: `pooled_blocks`' path in plain torch.

`keep_best_kernel`: the best blocks of every row, without a sort. Oracle: `keep_best`'s path in plain torch.

Grids are (query tiles, blocks or rows; heads; batch). A tile's slots hold one part of a block, or several whole blocks
of at most `SIZE` slots each, so that small blocks fill a tile too. Tensors are `[B, H, N, D]`, contiguous in the last
dimension and with any strides elsewhere; offsets are `[B|1, H|1, M+1]`. Imported by the launchers when they first run,
never with the package.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dit_sparse.kernels.triton_kernels import load_tile, multiply


@triton.jit
def slots(offsets, block, part, num_blocks, GROUP: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """First positions of a tile's `GROUP * SIZE` slots of `STRIDE` tokens, and the ends of the blocks they lie in."""
    slot = tl.arange(0, GROUP * SIZE)
    blocks = block + slot // SIZE
    exists = blocks < num_blocks
    # A block that does not exist is empty: it starts and ends at 0.
    start = tl.load(offsets + blocks, mask=exists, other=0)
    end = tl.load(offsets + blocks + 1, mask=exists, other=0)
    return start + (part * SIZE + slot % SIZE) * STRIDE, end


@triton.jit
def block_sums(weights, GROUP: tl.constexpr, K_GROUP: tl.constexpr):
    """`[GROUP, K_GROUP]` sums of a tile's weights over its query and key blocks."""
    ROWS: tl.constexpr = weights.shape[0]
    COLUMNS: tl.constexpr = weights.shape[1]
    if K_GROUP == 1:
        rows = tl.sum(weights, 1)[:, None]
    else:
        rows = tl.sum(tl.reshape(weights, [ROWS, K_GROUP, COLUMNS // K_GROUP]), 2)
    return tl.sum(tl.reshape(rows, [GROUP, ROWS // GROUP, K_GROUP]), 1)


@triton.jit
def add_mass(mass, row_stride, q_block, k_block, num_q_blocks, num_k_blocks, found,
             GROUP: tl.constexpr, K_GROUP: tl.constexpr, ONCE: tl.constexpr):  # fmt: skip
    """Adds `[GROUP, K_GROUP]` to the mass, which is zero at first; a plain store where one tile alone comes by."""
    rows, columns = q_block + tl.arange(0, GROUP), k_block + tl.arange(0, K_GROUP)
    pointers = mass + rows.to(tl.int64)[:, None] * row_stride + columns[None, :]
    mask = (rows < num_q_blocks)[:, None] & (columns < num_k_blocks)[None, :]
    if ONCE:
        tl.store(pointers, found, mask=mask)
    else:
        tl.atomic_add(pointers, found, mask=mask, sem="relaxed")


@triton.jit
def tile_mass(queries, sums, k, positions, end, stride, scale, D: tl.constexpr, BLOCK_D: tl.constexpr,
              GROUP: tl.constexpr, K_GROUP: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """`[GROUP, K_GROUP]` mass that the key tile at `positions` has in the query tile's blocks."""
    keys = load_tile(k, positions, end, stride, D, BLOCK_D, MASKED)
    weights = tl.exp2(multiply(queries, tl.trans(keys), UPCAST) * scale - sums[:, None])
    if MASKED:
        weights = tl.where((positions < end)[None, :], weights, 0.0)
    return block_sums(weights, GROUP, K_GROUP)


@triton.jit
def block_mass_kernel(
    q, k, lse, mass, q_offsets, k_offsets,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, lse_sb, lse_sh, m_sb, m_sh, m_sm, qo_sb, qo_sh, ko_sb, ko_sh,
    num_q_blocks, num_k_blocks, run_start, run_end, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr, K_GROUP: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Mass of a query tile in every key block; groups of key blocks `run_start` to `run_end` fill their tiles."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_block, q_part = tl.program_id(0) // Q_TILES * GROUP, tl.program_id(0) % Q_TILES
    q_offsets += b * qo_sb + h * qo_sh
    k_offsets += b * ko_sb + h * ko_sh
    rows, end = slots(q_offsets, q_block, q_part, num_q_blocks, GROUP, BLOCK_M // GROUP, 1)
    if tl.max(end - rows, 0) <= 0:
        return
    queries = load_tile(q + b * q_sb + h * q_sh, rows, end, q_sn, D, BLOCK_D, True)
    sums = tl.load(lse + b * lse_sb + h * lse_sh + rows, mask=rows < end, other=float("inf"))
    # A row that kept nothing has no mass.
    sums = tl.where(sums == -float("inf"), float("inf"), sums) * 1.4426950408889634
    k += b * k_sb + h * k_sh
    mass += b * m_sb + h * m_sh

    # Blocks of the run lie side by side, so their positions need no look at the offsets.
    first = tl.load(k_offsets + run_start * K_GROUP)
    for i in tl.range(0, (run_end - run_start) * K_TILES):
        positions = first + i * BLOCK_N + tl.arange(0, BLOCK_N)
        found = tile_mass(queries, sums, k, positions, 0, k_sn, scale, D, BLOCK_D, GROUP, K_GROUP, False, UPCAST)
        add_mass(mass, m_sm, q_block, (run_start + i // K_TILES) * K_GROUP, num_q_blocks, num_k_blocks, found,
                 GROUP, K_GROUP, Q_TILES == 1 and K_TILES == 1)  # fmt: skip
    others = tl.cdiv(num_k_blocks, K_GROUP) - (run_end - run_start)
    for i in tl.range(0, others * K_TILES):
        group = i // K_TILES
        k_block = tl.where(group < run_start, group, group - run_start + run_end) * K_GROUP
        positions, k_end = slots(k_offsets, k_block, i % K_TILES, num_k_blocks, K_GROUP, BLOCK_N // K_GROUP, 1)
        found = tile_mass(queries, sums, k, positions, k_end, k_sn, scale, D, BLOCK_D, GROUP, K_GROUP, True, UPCAST)
        add_mass(mass, m_sm, q_block, k_block, num_q_blocks, num_k_blocks, found,
                 GROUP, K_GROUP, Q_TILES == 1 and K_TILES == 1)  # fmt: skip


@triton.jit
def antidiagonal_tile(
    q, k, q_first, q_end, k_offsets, i, num_k_blocks, q_sn, k_sn, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, K_GROUP: tl.constexpr, K_TILES: tl.constexpr,
    STRIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of the query slots against key tile `i`: sum over s of q[first + STRIDE - 1 - s] . k[first + s]."""
    SIZE: tl.constexpr = BLOCK_N // K_GROUP
    k_first, k_end = slots(k_offsets, i // K_TILES * K_GROUP, i % K_TILES, num_k_blocks, K_GROUP, SIZE, STRIDE)
    products = tl.zeros([q_first.shape[0], BLOCK_N], tl.float32)
    for s in tl.range(0, STRIDE):
        queries = load_tile(q, q_first + (STRIDE - 1 - s), q_end, q_sn, D, BLOCK_D, True)
        keys = load_tile(k, k_first + s, k_end, k_sn, D, BLOCK_D, True)
        products += multiply(queries, tl.trans(keys), UPCAST)
    return tl.where((k_first < k_end)[None, :], products * scale, -float("inf"))


@triton.jit
def antidiagonal_kernel(
    q, k, mass, q_offsets, k_offsets,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, m_sb, m_sh, m_sm, qo_sb, qo_sh, ko_sb, ko_sh,
    num_q_blocks, num_k_blocks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr,
    K_GROUP: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr, STRIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores of a query tile's blocks for every key block: once over the keys for the row sums, once for the shares."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    q_block, q_part = tl.program_id(0) // Q_TILES * GROUP, tl.program_id(0) % Q_TILES
    k_offsets += b * ko_sb + h * ko_sh
    first, end = slots(
        q_offsets + b * qo_sb + h * qo_sh, q_block, q_part, num_q_blocks, GROUP, BLOCK_M // GROUP, STRIDE
    )
    if tl.max(end - first, 0) <= 0:
        return
    q += b * q_sb + h * q_sh
    k += b * k_sb + h * k_sh
    mass += b * m_sb + h * m_sh
    tiles = tl.cdiv(num_k_blocks, K_GROUP) * K_TILES
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(0, tiles):
        scores = antidiagonal_tile(
            q, k, first, end, k_offsets, i, num_k_blocks, q_sn, k_sn, scale,
            D, BLOCK_D, BLOCK_N, K_GROUP, K_TILES, STRIDE, UPCAST,
        )  # fmt: skip
        peak = tl.maximum(m, tl.max(scores, 1))
        # A row that has seen no key yet: -inf less -inf would be NaN.
        shift = tl.where(peak == -float("inf"), 0.0, peak)
        total = total * tl.exp2(m - shift) + tl.sum(tl.exp2(scores - shift[:, None]), 1)
        m = peak
    counts = (first < end) & (total > 0.0)
    sums = tl.where(counts, m + tl.log2(tl.where(counts, total, 1.0)), float("inf"))
    for i in tl.range(0, tiles):
        scores = antidiagonal_tile(
            q, k, first, end, k_offsets, i, num_k_blocks, q_sn, k_sn, scale,
            D, BLOCK_D, BLOCK_N, K_GROUP, K_TILES, STRIDE, UPCAST,
        )  # fmt: skip
        found = block_sums(tl.exp2(scores - sums[:, None]), GROUP, K_GROUP)
        add_mass(mass, m_sm, q_block, i // K_TILES * K_GROUP, num_q_blocks, num_k_blocks, found,
                 GROUP, K_GROUP, Q_TILES == 1 and K_TILES == 1)  # fmt: skip


@triton.jit
def pooled_kernel(
    x, out, offsets, x_sb, x_sh, x_sn, o_sb, o_sh, o_sm, f_sb, f_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Mean of one block's tokens in float32; zeros for an empty block."""
    b, h, block = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    bounds = offsets + b * f_sb + h * f_sh + block
    start, end = tl.load(bounds), tl.load(bounds + 1)
    x += b * x_sb + h * x_sh
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for first in tl.range(start, end, BLOCK_N):
        acc += load_tile(x, first + tl.arange(0, BLOCK_N), end, x_sn, D, BLOCK_D, True).to(tl.float32)
    channels = tl.arange(0, BLOCK_D)
    means = tl.sum(acc, 0) / tl.maximum(end - start, 1).to(tl.float32)
    tl.store(out + b * o_sb + h * o_sh + block * o_sm + channels, means, mask=channels < D)


@triton.jit
def keep_best_kernel(
    scores, counts, kept, s_sb, s_sh, s_sm, s_sn, c_sb, c_sh, k_sb, k_sh, k_sm, num_blocks, BLOCK: tl.constexpr
):
    """Keeps the `counts` best blocks of one row; among equals the earlier ones. NaN counts as best, as torch sorts."""
    b, h, row = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_blocks
    x = tl.load(scores + b * s_sb + h * s_sh + row * s_sm + columns.to(tl.int64) * s_sn, mask=inside, other=0.0)
    x = x.to(tl.float32)
    # Keys from 1 on that order as the scores do; -0 equals 0, and what lies outside is below all.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x != x, 0x7FFFFFFF, key).to(tl.int64) + 0x80000000
    key = tl.where(inside, key, 0)
    wanted = tl.minimum(tl.maximum(tl.load(counts + b * c_sb + h * c_sh), 1), num_blocks)
    # The largest key that `wanted` keys reach, bit by bit from the highest.
    last = tl.zeros([], tl.int64)
    bit = tl.full([], 0x80000000, tl.int64)
    for _ in tl.range(0, 32):
        last = tl.where(tl.sum((key >= last + bit).to(tl.int32), 0) >= wanted, last + bit, last)
        bit = bit // 2
    above = tl.sum((key > last).to(tl.int32), 0)
    equal = inside & (key == last)
    keep = (key > last) | (equal & (above + tl.cumsum(equal.to(tl.int32), 0) <= wanted))
    tl.store(kept + b * k_sb + h * k_sh + row * k_sm + columns, keep.to(tl.uint8), mask=inside)
