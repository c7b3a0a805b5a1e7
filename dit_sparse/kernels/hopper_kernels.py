"""Gluon kernel for Hopper (sm_90a): block-sparse attention with copies and products in warps of their own.

out = softmax(scale * q K^T) V over the kept keys, and the rows' LSE. One producer warp brings key and value tiles into
a ring in shared memory by TMA; one or two consumer warpgroups of 64 query rows each multiply (wgmma), so that Q K^T of
one tile overlaps P V of the tile before, as in FlashAttention-3 (arXiv 2407.08608, algorithm 2). Oracle: `reference`.

A key tile is one block, a part of a larger block, or (PAIR) two blocks of at most 64 keys side by side. Full blocks
stand first among a row's entries, partial ones after them. Only tiles that hold an uneven or a partial block are
masked. A row without keys visits one tile that is hidden whole, so that producer and consumers always agree on the
number of tiles; it gives zeros and -inf. With a remainder (MEANS) tiles of all blocks' means follow, each with a bias
that hides those of kept blocks, and (SLOPES) the query block's matrix as one more tile of values. Tensors come as TMA
descriptors over `[B, H, N, D]`; lists are `[B|1, H|1, ...]`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.hopper_producer import produce
from dit_sparse.kernels.hopper_tiles import (
    ROWS,
    add_bias,
    count_tiles,
    first_barriers,
    hide,
    plain_tiles,
    query_tile,
)

# Triton 3.6 names the copies after their direction, later versions do not.
store_async = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

RENAMED = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))


@gluon.jit
def seen_as(memory, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory under another shape and layout."""
    if RENAMED:
        return memory.reinterpret(memory.dtype, shape, layout)
    else:
        return memory._reinterpret(memory.dtype, shape, layout)


@gluon.jit
def soften(scores, m, total, scale):
    """Online softmax over one more tile: the new maximum, sum, the factor of the old output, and the weights."""
    peak = gl.maximum(m, gl.max(scores, 1) * scale)
    # A row that has seen no key yet: -inf less -inf would be NaN.
    shift = gl.where(peak == -float("inf"), 0.0, peak)
    weights = gl.exp2(scores * scale - shift[:, None])
    keep = gl.exp2(m - shift)
    return peak, total * keep + gl.sum(weights, 1), keep, weights


@gluon.jit
def write_rows(
    tile, flat, acc, m, total, outputs, b, h, first, end,
    D: gl.constexpr, RETURN_LSE: gl.constexpr, LAYOUT: gl.constexpr, S_ROWS: gl.constexpr,
):  # fmt: skip
    """Normalise a warpgroup's rows and write them, by TMA where all are its block's, else row by row.

    `tile` and `flat` are the warpgroup's own rows in shared memory.
    """
    o_desc, out, o_sb, o_sh, o_sn, channels, lse, lse_sb, lse_sh = outputs
    sums = gl.convert_layout(total, gl.SliceLayout(1, LAYOUT))
    # Rows without keys hold zeros divided by one, whatever the hidden tile's values were.
    acc = gl.where((sums == 0.0)[:, None], 0.0, acc / gl.where(sums == 0.0, 1.0, sums)[:, None])
    tma.store_wait(0)  # the tile before may still be on its way out
    flat.store(acc.to(flat.dtype))
    if first + ROWS <= end:
        fence_async_shared()
        store_async(o_desc, [b.to(gl.int32), h.to(gl.int32), first, 0], tile)
    else:
        COPY: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
        row = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY))
        channel = gl.arange(0, D, layout=gl.SliceLayout(0, COPY))
        pointers = out + b * o_sb + h * o_sh + (row.to(gl.int64) * o_sn)[:, None] + channel[None, :]
        gl.store(pointers, flat.load(COPY), mask=(row < end)[:, None] & (channel < channels)[None, :])
    if RETURN_LSE:
        rows = first + gl.arange(0, ROWS, layout=S_ROWS)
        found = gl.where(
            total == 0.0, -float("inf"), (m + gl.log2(gl.where(total == 0.0, 1.0, total))) * 0.6931471805599453
        )
        gl.store(lse + b * lse_sb + h * lse_sh + rows, found, mask=rows < end)


@gluon.jit
def next_tile(nexts, barriers, full, free, turn):
    """The query tile that the producer has taken for the next turn."""
    slot = turn % 2
    mbarrier.wait(barriers.index(full + slot), (turn // 2) & 1)
    tile = gl.max(nexts.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(barriers.index(free + slot), count=1)
    return tile


@gluon.jit
def multiply(
    queries, operand, acc, ks, vs, biases, barriers, k_number, v_number, tile, exact, unit, base,
    BLOCK_N: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, MEANS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start Q K^T of a tile and P V of the tile before; wait for the first of them alone."""
    k_full, k_free, v_full, _, _, _, _, _ = first_barriers(STAGES_K, STAGES_V)
    k_slot = k_number % STAGES_K
    v_slot = v_number % STAGES_V
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    mbarrier.wait(barriers.index(k_full + k_slot), (k_number // STAGES_K) & 1)
    product = warpgroup_mma(queries, ks.index(k_slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(barriers.index(v_full + v_slot), (v_number // STAGES_V) & 1)
    values = warpgroup_mma(operand, vs.index(v_slot), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=(product,))
    if MEANS:  # noqa: SIM102, it is known when the kernel is compiled
        if tile >= exact:
            scores = add_bias(scores, biases.index(k_slot), base, unit, LAYOUT)
    mbarrier.arrive(barriers.index(k_free + k_slot), count=1)
    return values, scores


@gluon.jit
def add_slopes(
    queries, tail, acc, vs, barriers, full, free, number,
    Q_IN_REGISTERS: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """The first order of the remainder: queries times their block's matrix, which came as one more tile of values."""
    slot = number % STAGES
    mbarrier.wait(barriers.index(full + slot), (number // STAGES) & 1)
    if Q_IN_REGISTERS:
        rows = gl.convert_layout(queries, gl.DotOperandLayout(0, LAYOUT, 2))
    else:
        rows = queries
    zero = gl.zeros([ROWS, D], gl.float32, LAYOUT)
    product = warpgroup_mma(rows, vs.index(slot).slice(0, D), zero, use_acc=False, is_async=True)
    product = warpgroup_mma_wait(0, deps=(product,))
    mbarrier.arrive(barriers.index(free + slot), count=1)
    return acc + gl.convert_layout(tail, gl.SliceLayout(1, LAYOUT))[:, None] * product


@gluon.jit
def consume(
    shared, barriers, lists, strides, partial, outputs, sizes, scale, means,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, K_TILES: gl.constexpr,
    PAIR: gl.constexpr, Q_TILES: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr,
    Q_IN_REGISTERS: gl.constexpr, PARTIAL: gl.constexpr, RETURN_LSE: gl.constexpr, EARLY: gl.constexpr,
    MEANS: gl.constexpr, SLOPES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: softmax(q K^T) V of its 64 rows of every tile."""
    qs, ks, vs, biases, o_tiles, os, nexts = shared
    k_full, k_free, v_full, v_free, q_full, q_free, next_full, next_free = first_barriers(STAGES_K, STAGES_V)
    tiles, _, _, last, _, _ = sizes
    bits, bits_sb, bits_sh, bits_sm, bits_sl, words, q_block = partial
    mean_tiles, base = means
    unit = 1.4426950408889634 / scale  # makes a bias a score
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    done = 0
    done_v = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles:
        b, h, block, first_row, start, end, row = query_tile(
            tile, lists, strides, sizes, GROUPS * ROWS, Q_TILES, PARTIAL
        )  # fmt: skip
        exact = count_tiles(row, PAIR, K_TILES)
        count = exact + mean_tiles
        first_row += GROUP * ROWS
        first = start + GROUP * ROWS
        own_bits = bits
        if PARTIAL:
            own_bits += b * bits_sb + h * bits_sh + block.to(gl.int64) * bits_sm
        m = gl.full([ROWS], -float("inf"), gl.float32, S_ROWS)
        total = gl.zeros([ROWS], gl.float32, S_ROWS)
        tail = gl.zeros([ROWS], gl.float32, S_ROWS)
        acc = gl.zeros([ROWS, D], gl.float32, OUT)
        plain = plain_tiles(row, PAIR, K_TILES)
        mbarrier.wait(barriers.index(q_full), turn & 1)
        if Q_IN_REGISTERS:
            queries = qs.index(GROUP).load(gl.DotOperandLayout(0, S, 2))
            if EARLY:
                mbarrier.arrive(barriers.index(q_free), count=1)
        else:
            queries = qs.index(GROUP)
        slot = done % STAGES_K
        mbarrier.wait(barriers.index(k_full + slot), (done // STAGES_K) & 1)
        product = warpgroup_mma(queries, ks.index(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(barriers.index(k_free + slot), count=1)
        if plain == 0:
            scores = hide(
                scores, 0, row, last, own_bits, bits_sl, words, q_block, first_row, PAIR, K_TILES, BLOCK_N, PARTIAL, S
            )  # fmt: skip
        m, total, keep, weights = soften(scores, m, total, scale)
        operand = gl.convert_layout(weights.to(vs.dtype), WEIGHTS)
        for i in range(1, count):
            values, scores = multiply(
                queries, operand, acc, ks, vs, biases, barriers, done + i, done_v + i - 1, i, exact, unit, base,
                BLOCK_N, STAGES_K, STAGES_V, MEANS, S,
            )  # fmt: skip
            if (i >= plain) & (i < exact):
                scores = hide(
                    scores, i, row, last, own_bits, bits_sl, words, q_block, first_row, PAIR, K_TILES, BLOCK_N, PARTIAL,
                    S,
                )  # fmt: skip
            before = total
            m, total, keep, weights = soften(scores, m, total, scale)
            if SLOPES:
                tail = tail * keep + (total - before * keep) * (i >= exact).to(gl.float32)
            acc = warpgroup_mma_wait(0, deps=(values,))
            mbarrier.arrive(barriers.index(v_free + (done_v + i - 1) % STAGES_V), count=1)
            acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, OUT))[:, None]
            operand = gl.convert_layout(weights.to(vs.dtype), WEIGHTS)
        done += count
        done_v += count
        v_slot = (done_v - 1) % STAGES_V
        mbarrier.wait(barriers.index(v_full + v_slot), ((done_v - 1) // STAGES_V) & 1)
        acc = warpgroup_mma_wait(0, deps=(warpgroup_mma(operand, vs.index(v_slot), acc, is_async=True),))
        mbarrier.arrive(barriers.index(v_free + v_slot), count=1)
        if SLOPES:
            acc = add_slopes(
                queries, tail, acc, vs, barriers, v_full, v_free, done_v, Q_IN_REGISTERS, D, STAGES_V, OUT
            )  # fmt: skip
            done_v += 1
        write_rows(
            o_tiles.index(GROUP), os.index(GROUP), acc, m, total, outputs, b, h, first, end, D, RETURN_LSE, OUT, S_ROWS
        )
        if not EARLY:
            tma.store_wait(0)
            mbarrier.arrive(barriers.index(q_free), count=1)
        tile = next_tile(nexts, barriers, next_full, next_free, turn)
        turn += 1
    if EARLY:
        tma.store_wait(0)


# Without this every other mask or batch size would be compiled for its strides anew.
PLAIN_NUMBERS = [
    "o_sb", "o_sh", "o_sn", "lse_sb", "lse_sh", "qo_sb", "qo_sh", "ko_sb", "ko_sh", "c_sb", "c_sh", "i_sb", "i_sh",
    "i_sm", "pc_sb", "pc_sh", "pi_sb", "pi_sh", "pi_sm", "bits_sb", "bits_sh", "bits_sm", "bits_sl", "words",
    "q_block", "tiles", "heads", "row_tiles", "last", "run_start", "run_end", "k_size", "channels",
    "mean_tiles",
]  # fmt: skip


@gluon.jit(do_not_specialize=PLAIN_NUMBERS)
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, mean_k_desc, mean_v_desc, slope_desc, bias_desc, out, lse, counts, indices,
    partial_counts, partial_indices, bits, q_offsets, k_offsets,
    o_sb, o_sh, o_sn, lse_sb, lse_sh, qo_sb, qo_sh, ko_sb, ko_sh, c_sb, c_sh, i_sb, i_sh, i_sm,
    pc_sb, pc_sh, pi_sb, pi_sh, pi_sm, bits_sb, bits_sh, bits_sm, bits_sl, words, q_block,
    tiles, heads, row_tiles, last, run_start, run_end, k_size, channels, scale, taken,
    mean_tiles, base,
    GROUPS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, K_TILES: gl.constexpr, PAIR: gl.constexpr,
    Q_TILES: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, Q_IN_REGISTERS: gl.constexpr,
    PARTIAL: gl.constexpr, RETURN_LSE: gl.constexpr, EARLY: gl.constexpr, FLAT: gl.constexpr,
    MEANS: gl.constexpr, SLOPES: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the warps' roles; `FLAT` is the 2-D layout of what the 4-D copies bring."""
    dtype: gl.constexpr = q_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    BOX: gl.constexpr = [1, 1, 64, 64] if PAIR else [1, 1, BLOCK_N, D]
    BOXES: gl.constexpr = D // 32 if PAIR else 1
    q_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES_K * BOXES] + BOX, k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES_V * BOXES] + BOX, v_desc.layout)
    qs = seen_as(q_tiles, [GROUPS, ROWS, D], FLAT)
    ks = seen_as(k_tiles, [STAGES_K, BLOCK_N, D], FLAT)
    vs = seen_as(v_tiles, [STAGES_V, BLOCK_N, D], FLAT)
    if EARLY:
        # The queries' place is free for the next tile's as soon as they are read, so the output needs its own.
        o_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 1, 1, ROWS, D], q_desc.layout)
    else:
        o_tiles = q_tiles
    os = seen_as(o_tiles, [GROUPS, ROWS, D], FLAT)
    nexts = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    if MEANS:
        bias_tiles = gl.allocate_shared_memory(gl.float16, [STAGES_K, 1, 1, 1, BLOCK_N], bias_desc.layout)
        biases = seen_as(bias_tiles, [STAGES_K, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    else:
        bias_tiles = nexts
        biases = nexts
    barriers = gl.allocate_shared_memory(gl.int64, [32 if STAGES_K + STAGES_V > 5 else 16, 1], BARRIER)
    k_full, k_free, v_full, v_free, q_full, q_free, next_full, next_free = first_barriers(STAGES_K, STAGES_V)
    for slot in gl.static_range(2):
        mbarrier.init(barriers.index(next_full + slot), count=1)
        mbarrier.init(barriers.index(next_free + slot), count=GROUPS)
    for stage in gl.static_range(STAGES_K):
        mbarrier.init(barriers.index(k_full + stage), count=1)
        mbarrier.init(barriers.index(k_free + stage), count=GROUPS)
    for stage in gl.static_range(STAGES_V):
        mbarrier.init(barriers.index(v_full + stage), count=1)
        mbarrier.init(barriers.index(v_free + stage), count=GROUPS)
    mbarrier.init(barriers.index(q_full), count=1)
    mbarrier.init(barriers.index(q_free), count=GROUPS)
    fence_async_shared()
    lists = (counts, indices, partial_counts, partial_indices, q_offsets, k_offsets)
    strides = (c_sb, c_sh, i_sb, i_sh, i_sm, pc_sb, pc_sh, pi_sb, pi_sh, pi_sm, qo_sb, qo_sh, ko_sb, ko_sh)
    partial = (bits, bits_sb, bits_sh, bits_sm, bits_sl, words, q_block)
    outputs = (o_desc, out, o_sb, o_sh, o_sn, channels, lse, lse_sb, lse_sh)
    sizes = (tiles, heads, row_tiles, last, run_start, run_end)
    reads = (qs, ks, vs, biases, o_tiles, os, nexts)
    descs = (q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, slope_desc, bias_desc)
    means = (mean_tiles, base)
    copies = (q_tiles, k_tiles, v_tiles, bias_tiles, nexts)
    # Compile-time numbers keep their kind only where the tuple of arguments is written out.
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (consume, (
                    reads, barriers, lists, strides, partial, outputs, sizes, scale, means, 0, GROUPS, D,
                    BLOCK_N, K_TILES, PAIR, Q_TILES, STAGES_K, STAGES_V, Q_IN_REGISTERS, PARTIAL, RETURN_LSE, EARLY,
                    MEANS, SLOPES)),
                (consume, (
                    reads, barriers, lists, strides, partial, outputs, sizes, scale, means, 1, GROUPS, D,
                    BLOCK_N, K_TILES, PAIR, Q_TILES, STAGES_K, STAGES_V, Q_IN_REGISTERS, PARTIAL, RETURN_LSE, EARLY,
                    MEANS, SLOPES)),
                (produce, (
                    descs, copies, barriers, lists, strides, sizes, k_size, taken, mean_tiles, channels, GROUPS, D,
                    BLOCK_N, K_TILES, PAIR, Q_TILES, STAGES_K, STAGES_V, PARTIAL, MEANS, SLOPES)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (consume, (
                    reads, barriers, lists, strides, partial, outputs, sizes, scale, means, 0, GROUPS, D,
                    BLOCK_N, K_TILES, PAIR, Q_TILES, STAGES_K, STAGES_V, Q_IN_REGISTERS, PARTIAL, RETURN_LSE, EARLY,
                    MEANS, SLOPES)),
                (produce, (
                    descs, copies, barriers, lists, strides, sizes, k_size, taken, mean_tiles, channels, GROUPS, D,
                    BLOCK_N, K_TILES, PAIR, Q_TILES, STAGES_K, STAGES_V, PARTIAL, MEANS, SLOPES)),
            ],
            [1],
            [PRODUCER_REGISTERS],
        )  # fmt: skip
