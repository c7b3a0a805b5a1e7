"""Gluon kernel for Hopper (sm_90a): what a block's mean in place of its tokens would change.

The same as `output_error_kernel`, whose header has the formula, with copies and products in warps of their own: one
producer warp brings tiles of keys and values into rings in shared memory by TMA; two consumer warpgroups of 64 probes
each multiply (wgmma). While P V of one block runs the weights of the next are made, and while Q K^T of the one after
that runs, the change of the first is squared. Oracle: `output_errors`' path in torch.

Grid: (probe tiles x spans of key blocks x heads x batch). A key block is one tile. Keys and values come as TMA
descriptors over `[B, H, N, D]`; probes and what they attend to are contiguous.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from dit_sparse.kernels.hopper_kernels import seen_as
from dit_sparse.kernels.hopper_producer import load_async, slot_of
from dit_sparse.kernels.hopper_tiles import ROWS, first_barriers

GROUPS = gl.constexpr(2)  # consumer warpgroups


@gluon.jit
def program_of(sizes, SLOTS: gl.constexpr):
    """Batch, head, tile of probes, first key block and the end of them, of this thread block.

    Neighbours in time share their key blocks, which then come from the L2 cache.
    """
    heads, q_blocks, blocks, _, span, _, _ = sizes
    tiles = gl.cdiv(q_blocks * SLOTS, GROUPS * ROWS)
    spans = gl.cdiv(blocks, span)
    program = gl.program_id(0)
    tile = program % tiles
    first = program // tiles % spans * span
    head = program // (tiles * spans)
    return (head // heads).to(gl.int64), (head % heads).to(gl.int64), tile, first, gl.minimum(first + span, blocks)


@gluon.jit
def produce_run(
    descs, tiles, barriers, starts, b, h, first, end, numbers, BLOCK_N: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Keys of a run of blocks, and of one more, which the consumers have begun by then; their values."""
    k_desc, v_desc = descs
    ks, vs = tiles
    k_full, k_free, v_full, v_free, _, _, _, _ = first_barriers(STAGES, STAGES)
    k_number, v_number = numbers
    SIZE: gl.constexpr = BLOCK_N * D * 2
    if first < end:
        start = gl.load(starts + first)
        slot, barrier = slot_of(barriers, k_full, k_free, k_number, STAGES, SIZE)
        load_async(k_desc, [b, h, start, 0], barrier, ks.index(slot))
        following = gl.load(starts + gl.minimum(first + 1, end - 1))
        for i in range(first, end):
            later = gl.load(starts + gl.minimum(i + 2, end - 1))
            slot, barrier = slot_of(barriers, k_full, k_free, k_number + i - first + 1, STAGES, SIZE)
            load_async(k_desc, [b, h, following, 0], barrier, ks.index(slot))
            slot, barrier = slot_of(barriers, v_full, v_free, v_number + i - first, STAGES, SIZE)
            load_async(v_desc, [b, h, start, 0], barrier, vs.index(slot))
            start = following
            following = later
    return after(numbers, first, end)


@gluon.jit
def after(numbers, first, end):
    """How many tiles of keys and of values have passed, after a run of blocks."""
    count = gl.maximum(end - first, 0)
    return numbers[0] + count + (count > 0).to(gl.int32), numbers[1] + count


@gluon.jit
def produce(
    descs, tiles, barriers, places, sizes,
    SLOTS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer warp: tiles of keys and values in the order in which `consume` takes them."""
    b, h, _, first, end = program_of(sizes, SLOTS)
    b, h = b.to(gl.int32), h.to(gl.int32)
    _, _, blocks, _, _, whole, wide = sizes
    starts = places + blocks
    numbers = (first * 0, first * 0)
    numbers = produce_run(
        descs, tiles, barriers, starts, b, h, first, gl.minimum(end, whole), numbers, BLOCK_N, D, STAGES
    )  # fmt: skip
    numbers = produce_run(
        descs, tiles, barriers, starts, b, h, gl.maximum(first, whole), gl.minimum(end, wide), numbers, BLOCK_N, D,
        STAGES,
    )  # fmt: skip
    produce_run(descs, tiles, barriers, starts, b, h, gl.maximum(first, wide), end, numbers, BLOCK_N, D, STAGES)


@gluon.jit
def attend(queries, ks, barriers, full, number, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """Start Q K^T of the `number`-th tile of keys."""
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    slot = number % STAGES
    mbarrier.wait(barriers.index(full + slot), (number // STAGES) & 1)
    keys = ks.index(slot).slice(0, BLOCK_N).permute((1, 0))
    return warpgroup_mma(queries, keys, zero, use_acc=False, is_async=True)


@gluon.jit
def weigh(
    scores, size, spread, largest_spread, sums, scale, BLOCK_N: gl.constexpr, MASKED: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Weights of a block's keys less their mean's `a / B`, and the sum of these."""
    if MASKED:
        inside = (gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)) < size)[None, :]
        scores = gl.where(inside, scores, 0.0)
        middle = gl.sum(scores, 1) * (scale / gl.maximum(size, 1).to(gl.float32))
    else:
        middle = gl.sum(scores, 1) * (scale / BLOCK_N)
    a = gl.where(spread <= largest_spread, gl.exp2(middle - sums), 0.0)
    weights = gl.exp2(scores * scale - sums[:, None]) - a[:, None]
    if MASKED:
        # The same mask told otherwise: kept from its first use it would take a register a column.
        column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT)).to(gl.float32)
        weights = gl.where((column < size.to(gl.float32))[None, :], weights, 0.0)
    return weights, gl.sum(weights, 1)


@gluon.jit
def store_squares(errors, change, total, attended, share, exists, SUMMED: gl.constexpr):
    """Squares of what is left of `change` without its weights' sum times the output, summed by query block."""
    change -= total[:, None] * attended
    squares = gl.reshape(gl.sum(change * change, 1), [ROWS // SUMMED, SUMMED])
    gl.store(errors, gl.sum(squares, 1) * share, mask=exists)


@gluon.jit
def consume_run(
    shared, barriers, probes, results, places, blocks, first, end, numbers, scale, largest_spread,
    SUMMED: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, MASKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup's part of a run of blocks of at most `BLOCK_N` keys, or (not MASKED) of just as many."""
    ks, vs = shared
    k_full, k_free, v_full, v_free, _, _, _, _ = first_barriers(STAGES, STAGES)
    queries, attended, sums, spread = probes
    errors, share, exists = results
    k_number, v_number = numbers
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    OUT_ROWS: gl.constexpr = gl.SliceLayout(1, OUT)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    queries = gl.convert_layout(queries, gl.DotOperandLayout(0, S, 2), assert_trivial=True)
    sums = gl.convert_layout(sums, S_ROWS, assert_trivial=True)
    spread = gl.convert_layout(spread, S_ROWS, assert_trivial=True)
    places += first
    count = end - first
    if count > 0:
        product = attend(queries, ks, barriers, k_full, k_number, BLOCK_N, STAGES, S)
        change = gl.zeros([ROWS, D], gl.float32, OUT)
        before = gl.zeros([ROWS], gl.float32, OUT_ROWS)
        size = gl.load(places + 2 * blocks)
        near = gl.load(spread + gl.load(places))
        scores = warpgroup_mma_wait(0, deps=(product,))
        mbarrier.arrive(barriers.index(k_free + k_number % STAGES), count=1)
        weights, total = weigh(scores, size, near, largest_spread, sums, scale, BLOCK_N, MASKED, S)
        operand = gl.convert_layout(weights.to(vs.dtype), WEIGHTS)
        following = gl.minimum(1, count - 1)
        size = gl.load(places + 2 * blocks + following)
        near = gl.load(spread + gl.load(places + following))
        for i in range(count):
            product = attend(queries, ks, barriers, k_full, k_number + i + 1, BLOCK_N, STAGES, S)
            # What a block needs beside its keys is read ahead: its number two steps, the rest one.
            later = gl.minimum(i + 2, count - 1)
            later_block = gl.load(places + later)
            later_size = gl.load(places + 2 * blocks + later)
            block = gl.load(places + gl.maximum(i - 1, 0))
            store_squares(errors + block, change, before, attended, share, exists & (i > 0), SUMMED)
            slot = (v_number + i) % STAGES
            phase = ((v_number + i) // STAGES) & 1
            mbarrier.wait(barriers.index(v_full + slot), phase)
            zero = gl.zeros([ROWS, D], gl.float32, OUT)
            values = vs.index(slot).slice(0, BLOCK_N)
            values = warpgroup_mma(operand, values, zero, use_acc=False, is_async=True)
            before = gl.convert_layout(total, OUT_ROWS)
            scores = warpgroup_mma_wait(1, deps=(product,))
            mbarrier.arrive(barriers.index(k_free + (k_number + i + 1) % STAGES), count=1)
            weights, total = weigh(scores, size, near, largest_spread, sums, scale, BLOCK_N, MASKED, S)
            near = gl.load(spread + later_block)
            # What waits with the product is kept apart from it: its weights till then, the next ones from then on.
            fresh = gl.convert_layout(weights.to(vs.dtype), WEIGHTS)
            # Passed already; without a branch here the assembler moves the next wait up, before the weights are made.
            mbarrier.wait(barriers.index(v_full + slot), phase)
            change, operand = warpgroup_mma_wait(0, deps=(values, fresh))
            mbarrier.arrive(barriers.index(v_free + slot), count=1)
            size = later_size
        block = gl.load(places + count - 1)
        store_squares(errors + block, change, before, attended, share, exists, SUMMED)
    return after(numbers, first, end)


@gluon.jit
def load_rows(base, rows, channels, D: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows `[64, D]` of a contiguous tensor in a layout of registers; zeros beyond `channels`."""
    rows = gl.convert_layout(rows, gl.SliceLayout(1, LAYOUT))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, LAYOUT))
    pointers = base + (rows.to(gl.int64) * channels)[:, None] + channel[None, :]
    return gl.load(pointers, mask=(channel < channels)[None, :], other=0.0)


@gluon.jit
def consume(
    shared, barriers, inputs, strides, q_offsets, places, sizes, channels, scale, largest_spread,
    GROUP: gl.constexpr, SLOTS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: squared errors of its 64 probes, summed by query block, and of every key block."""
    q, out, lse, spread, errors = inputs
    q_sb, q_sh, l_sb, l_sh, s_sb, s_sh, s_sm, e_sb, e_sh, e_sm = strides
    _, q_blocks, blocks, num_rows, _, whole, wide = sizes
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    S_ROWS: gl.constexpr = gl.SliceLayout(1, S)
    SUMMED: gl.constexpr = SLOTS if SLOTS < ROWS else ROWS
    b, h, tile, first, end = program_of(sizes, SLOTS)
    tile = tile * GROUPS + GROUP
    slots = tile * ROWS + gl.arange(0, ROWS, layout=S_ROWS)
    of_slot = gl.minimum(slots // SLOTS, q_blocks - 1)
    inside = (slots % SLOTS < num_rows) & (slots // SLOTS < q_blocks)
    rows = gl.where(inside, of_slot * num_rows + slots % SLOTS, 0)
    queries = load_rows(q + b * q_sb + h * q_sh, rows, channels, D, gl.DotOperandLayout(0, S, 2))
    attended = load_rows(out + b * q_sb + h * q_sh, rows, channels, D, OUT).to(gl.float32)
    # The weights of slots without a probe are zeros.
    sums = gl.load(lse + b * l_sb + h * l_sh + rows, mask=inside, other=float("inf")) * 1.4426950408889634
    spread += b * s_sb + h * s_sh + of_slot.to(gl.int64) * s_sm
    # Where the sums over a query block's rows end up: a layout that only the compiler can spell.
    written = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT)) // SUMMED
    written = gl.max(gl.reshape(written, [ROWS // SUMMED, SUMMED]), 1) + tile * (ROWS // SUMMED)
    exists = written * SUMMED < q_blocks * SLOTS
    of_block = q_offsets + gl.minimum(written * SUMMED // SLOTS, q_blocks - 1)
    share = (gl.load(of_block + 1) - gl.load(of_block)).to(gl.float32) / num_rows
    errors += b * e_sb + h * e_sh + written.to(gl.int64) * e_sm
    probes = (queries, attended, sums, spread)
    results = (errors, share, exists)
    numbers = (first * 0, first * 0)
    numbers = consume_run(
        shared, barriers, probes, results, places, blocks, first, gl.minimum(end, whole), numbers, scale,
        largest_spread, SUMMED, D, BLOCK_N, False, STAGES,
    )  # fmt: skip
    numbers = consume_run(
        shared, barriers, probes, results, places, blocks, gl.maximum(first, whole), gl.minimum(end, wide), numbers,
        scale, largest_spread, SUMMED, D, BLOCK_N, True, STAGES,
    )  # fmt: skip
    consume_run(
        shared, barriers, probes, results, places, blocks, gl.maximum(first, wide), end, numbers, scale,
        largest_spread, SUMMED, D, BLOCK_N // 2, True, STAGES,
    )  # fmt: skip


PLAIN_NUMBERS = [
    "q_sb", "q_sh", "l_sb", "l_sh", "s_sb", "s_sh", "s_sm", "e_sb", "e_sh", "e_sm", "heads", "q_blocks", "blocks",
    "num_rows", "span", "whole", "wide", "channels",
]  # fmt: skip


@gluon.jit(do_not_specialize=PLAIN_NUMBERS)
def search_kernel(
    k_desc, v_desc, q, out, lse, spread, errors, q_offsets, places, q_sb, q_sh, l_sb, l_sh, s_sb, s_sh, s_sm,
    e_sb, e_sh, e_sm, heads, q_blocks, blocks, num_rows, span, whole, wide, channels, scale, largest_spread,
    SLOTS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, FLAT: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Shared memory, barriers, and the warps' roles; `FLAT` is the 2-D layout of what the 4-D copies bring."""
    dtype: gl.constexpr = k_desc.dtype
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    ks = seen_as(k_tiles, [STAGES, BLOCK_N, D], FLAT)
    vs = seen_as(v_tiles, [STAGES, BLOCK_N, D], FLAT)
    barriers = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], BARRIER)
    k_full, k_free, v_full, v_free, _, _, _, _ = first_barriers(STAGES, STAGES)
    for stage in gl.static_range(STAGES):
        mbarrier.init(barriers.index(k_full + stage), count=1)
        mbarrier.init(barriers.index(k_free + stage), count=GROUPS)
        mbarrier.init(barriers.index(v_full + stage), count=1)
        mbarrier.init(barriers.index(v_free + stage), count=GROUPS)
    fence_async_shared()
    inputs = (q, out, lse, spread, errors)
    strides = (q_sb, q_sh, l_sb, l_sh, s_sb, s_sh, s_sm, e_sb, e_sh, e_sm)
    sizes = (heads, q_blocks, blocks, num_rows, span, whole, wide)
    shared = (ks, vs)
    # Compile-time numbers keep their kind only where the tuple of arguments is written out.
    gl.warp_specialize(
        [
            (consume, (
                shared, barriers, inputs, strides, q_offsets, places, sizes, channels, scale, largest_spread,
                0, SLOTS, D, BLOCK_N, STAGES)),
            (consume, (
                shared, barriers, inputs, strides, q_offsets, places, sizes, channels, scale, largest_spread,
                1, SLOTS, D, BLOCK_N, STAGES)),
            (produce, ((k_desc, v_desc), (k_tiles, v_tiles), barriers, places, sizes, SLOTS, D, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
