"""The producer warp of the Hopper kernel: copies tiles of queries, keys and values into shared memory, ahead of use."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from dit_sparse.kernels.hopper_tiles import ROWS, count_tiles, first_barriers, query_tile, tile_blocks, tile_starts

# Triton 3.6 names the copies after their direction, later versions do not.
load_async = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def copy_tile(desc, ring, barrier, slot, b, h, first, second, D: gl.constexpr, PAIR: gl.constexpr):
    """Start the copy of a tile into a slot of the ring: its rows stand from `first`, or by halves from `second`, on."""
    if PAIR:
        # Two blocks of 64 rows, interleaved by panels of 64 channels, make one tile of 128 rows.
        for panel in gl.static_range(D // 64):
            at = slot * (D // 32) + panel * 2
            load_async(desc, [b, h, first, panel * 64], barrier, ring.index(at))
            load_async(desc, [b, h, second, panel * 64], barrier, ring.index(at + 1))
    else:
        load_async(desc, [b, h, first, 0], barrier, ring.index(slot))


@gluon.jit
def slot_of(barriers, full, free, number, STAGES: gl.constexpr, BYTES: gl.constexpr):
    """The slot of the `number`-th tile of a ring as soon as it is free, and the barrier that its copy arrives at."""
    slot = number % STAGES
    barrier = barriers.index(full + slot)
    mbarrier.wait(barriers.index(free + slot), ((number // STAGES) & 1) ^ 1)
    mbarrier.expect(barrier, BYTES)
    return slot, barrier


@gluon.jit
def fetch(
    desc, mean_desc, bias_desc, ring, biases, barriers, full, free, number, tile, exact, blocks, b, h, block, row,
    sizes, k_size, origin, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, D: gl.constexpr, PAIR: gl.constexpr,
    K_TILES: gl.constexpr, MEANS: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """Copy a tile of keys or values, or of their block means, the `number`-th of this thread block.

    With the means of keys comes (BIAS) their bias for the query block.
    """
    first, second = tile_starts(tile, exact, blocks, row, sizes, k_size, origin, BLOCK_N, PAIR, K_TILES, MEANS)
    BYTES: gl.constexpr = BLOCK_N * D * 2
    if MEANS:
        if tile < exact:
            slot, barrier = slot_of(barriers, full, free, number, STAGES, BYTES)
            copy_tile(desc, ring, barrier, slot, b, h, first, second, D, PAIR)
        else:
            slot, barrier = slot_of(barriers, full, free, number, STAGES, BYTES + BIAS * BLOCK_N * 2)
            copy_tile(mean_desc, ring, barrier, slot, b, h, first, second, D, PAIR)
            if BIAS:
                load_async(bias_desc, [b, h, block, first], barrier, biases.index(slot))
    else:
        slot, barrier = slot_of(barriers, full, free, number, STAGES, BYTES)
        copy_tile(desc, ring, barrier, slot, b, h, first, second, D, PAIR)


@gluon.jit
def take_turn(taken, nexts, barriers, next_full, next_free, turn):
    """Take the next query tile that no thread block has taken, and tell the consumers which it is.

    Rows keep unlike numbers of blocks, so a fixed share of the tiles would leave thread blocks idle. Taken in order,
    the tiles at work are always neighbours, which read the same keys while they are in the L2 cache.
    """
    tile = gl.num_programs(0) + gl.atomic_add(taken, 1)
    slot = turn % 2
    mbarrier.wait(barriers.index(next_free + slot), ((turn // 2) & 1) ^ 1)
    nexts.index(slot).store(gl.full([1], tile, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(barriers.index(next_full + slot), count=1)
    return tile


@gluon.jit
def produce(
    descs, shared, barriers, lists, strides, sizes, k_size, taken, mean_tiles, channels,
    GROUPS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, K_TILES: gl.constexpr, PAIR: gl.constexpr,
    Q_TILES: gl.constexpr, STAGES_K: gl.constexpr, STAGES_V: gl.constexpr, PARTIAL: gl.constexpr, MEANS: gl.constexpr,
    SLOPES: gl.constexpr,
):  # fmt: skip
    """The producer warp: brings queries, keys and values of every tile in the order that `consume` reads them."""
    q_desc, k_desc, v_desc, mean_k_desc, mean_v_desc, slope_desc, bias_desc = descs
    qs, ks, vs, biases, nexts = shared
    k_full, k_free, v_full, v_free, q_full, q_free, next_full, next_free = first_barriers(STAGES_K, STAGES_V)
    tiles, _, _, _, run_start, _ = sizes
    issued = 0
    issued_v = 0
    turn = 0
    tile = gl.program_id(0)
    while tile < tiles:
        b, h, block, _, start, _, row = query_tile(tile, lists, strides, sizes, GROUPS * ROWS, Q_TILES, PARTIAL)
        b = b.to(gl.int32)
        h = h.to(gl.int32)
        exact = count_tiles(row, PAIR, K_TILES)
        count = exact + mean_tiles
        origin = gl.load(row[4] + run_start) - run_start * k_size
        blocks = tile_blocks(0, row, PAIR, K_TILES, PARTIAL)
        blocks_next = tile_blocks(1, row, PAIR, K_TILES, PARTIAL)
        fetch(
            k_desc, mean_k_desc, bias_desc, ks, biases, barriers, k_full, k_free, issued, 0, exact, blocks, b, h, block,
            row, sizes, k_size, origin, STAGES_K, BLOCK_N, D, PAIR, K_TILES, False, False,
        )  # fmt: skip
        mbarrier.wait(barriers.index(q_free), (turn & 1) ^ 1)
        mbarrier.expect(barriers.index(q_full), GROUPS * ROWS * D * 2)
        for group in gl.static_range(GROUPS):
            load_async(q_desc, [b, h, start + group * ROWS, 0], barriers.index(q_full), qs.index(group))
        tile = take_turn(taken, nexts, barriers, next_full, next_free, turn)
        for i in range(count):
            blocks_later = tile_blocks(i + 2, row, PAIR, K_TILES, PARTIAL)
            if i + 1 < count:
                fetch(
                    k_desc, mean_k_desc, bias_desc, ks, biases, barriers, k_full, k_free, issued + i + 1, i + 1, exact,
                    blocks_next, b, h, block, row, sizes, k_size, origin, STAGES_K, BLOCK_N, D, PAIR, K_TILES, MEANS,
                    MEANS,
                )  # fmt: skip
            fetch(
                v_desc, mean_v_desc, bias_desc, vs, biases, barriers, v_full, v_free, issued_v + i, i, exact, blocks, b,
                h, block, row, sizes, k_size, origin, STAGES_V, BLOCK_N, D, PAIR, K_TILES, MEANS, False,
            )  # fmt: skip
            blocks = blocks_next
            blocks_next = blocks_later
        issued += count
        issued_v += count
        if SLOPES:
            first = block * channels
            slot, barrier = slot_of(barriers, v_full, v_free, issued_v, STAGES_V, BLOCK_N * D * 2)
            copy_tile(slope_desc, vs, barrier, slot, b, h, first, first + 64, D, PAIR)
            issued_v += 1
        turn += 1
