"""Gluon helpers of the Hopper kernel: which key tiles a query tile visits, in which order, and what of them is hidden.

A row's entries are its whole key blocks and then its partial ones. Those that fill their tiles and need no mask are
visited first. A row is passed about as `(kept, full, indices, partial_indices, k_offsets, plain_start, plain_count)`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)  # query rows of a consumer warpgroup, the height of a wgmma


@gluon.jit
def first_barriers(STAGES_K: gl.constexpr, STAGES_V: gl.constexpr):
    """Where in the array of barriers those stand of slots of keys and of values, full and free, of queries full and
    free, and of the next query tile told and heard.

    They are one array, because each of its own would take shared memory to be handed to the warps.
    """
    V: gl.constexpr = 2 * STAGES_K
    Q: gl.constexpr = V + 2 * STAGES_V
    return 0, STAGES_K, V, V + STAGES_V, Q, Q + 1, Q + 2, Q + 4


@gluon.jit
def plain_entries(full, indices, sizes):
    """The whole key blocks of a row that fill their tiles: their numbers ascend, so they stand together in the list."""
    _, _, _, _, run_start, run_end = sizes
    start = full * 0
    end = full
    if run_start < run_end:
        while (start < end) & (gl.load(indices + gl.minimum(start, gl.maximum(end - 1, 0))) < run_start):
            start += 1
        while (end > start) & (gl.load(indices + gl.maximum(end - 1, 0)) >= run_end):
            end -= 1
    else:
        end = start
    return start, end - start


@gluon.jit
def query_tile(tile, lists, strides, sizes, SPAN: gl.constexpr, Q_TILES: gl.constexpr, PARTIAL: gl.constexpr):
    """Where a tile of `SPAN` queries lies: batch, head, block, its first row in the block, its positions; its entries.

    The entries of a query block are how many key blocks it keeps, how many of them whole, where the two lists begin,
    the bounds of the key blocks, and which entries need no mask. A tile past its block's end has none.
    """
    counts, indices, partial_counts, partial_indices, q_offsets, k_offsets = lists
    c_sb, c_sh, i_sb, i_sh, i_sm, pc_sb, pc_sh, pi_sb, pi_sh, pi_sm, qo_sb, qo_sh, ko_sb, ko_sh = strides
    _, heads, row_tiles, _, _, _ = sizes
    head = tile // row_tiles
    block = (tile % row_tiles) // Q_TILES
    first_row = (tile % Q_TILES) * SPAN
    b = (head // heads).to(gl.int64)
    h = (head % heads).to(gl.int64)
    bounds = q_offsets + b * qo_sb + h * qo_sh + block
    start = gl.load(bounds) + first_row
    end = gl.load(bounds + 1)
    full = gl.load(counts + b * c_sb + h * c_sh + block)
    indices += b * i_sb + h * i_sh + block.to(gl.int64) * i_sm
    kept = full
    if PARTIAL:
        kept += gl.load(partial_counts + b * pc_sb + h * pc_sh + block)
        partial_indices += b * pi_sb + h * pi_sh + block.to(gl.int64) * pi_sm
    if start >= end:
        full = 0
        kept = 0
    plain_start, plain_count = plain_entries(full, indices, sizes)
    row = kept, full, indices, partial_indices, k_offsets + b * ko_sb + h * ko_sh, plain_start, plain_count
    return b, h, block, first_row, start, end, row


@gluon.jit
def count_tiles(row, PAIR: gl.constexpr, K_TILES: gl.constexpr):
    """Key tiles that a query tile visits; at least one, so that the barriers always turn."""
    if PAIR:
        return gl.maximum((row[0] + 1) // 2, 1)
    else:
        return gl.maximum(row[0] * K_TILES, 1)


@gluon.jit
def plain_tiles(row, PAIR: gl.constexpr, K_TILES: gl.constexpr):
    """How many of a query tile's key tiles need no mask; they come first."""
    if PAIR:
        return row[6] // 2
    else:
        return row[6] * K_TILES


@gluon.jit
def entry_at(place, row):
    """The entry visited at a place: plain ones first, then those before them in the list, then those after."""
    start = row[5]
    count = row[6]
    entry = gl.where(place - count < start, place - count, place)
    return gl.where(place < count, place + start, entry)


@gluon.jit
def key_block(entry, row, PARTIAL: gl.constexpr):
    """Number of the key block of an entry; past their end that of the last one."""
    kept, full, indices, partial_indices, _, _, _ = row
    entry = gl.minimum(entry, gl.maximum(kept - 1, 0))
    if PARTIAL:
        if entry < full:
            block = gl.load(indices + entry)
        else:
            block = gl.load(partial_indices + entry - full)
    else:
        block = gl.load(indices + entry)
    return block


@gluon.jit
def tile_entries(tile, row, PAIR: gl.constexpr, K_TILES: gl.constexpr):
    """The one or two entries that a tile is made of."""
    if PAIR:
        return entry_at(2 * tile, row), entry_at(2 * tile + 1, row)
    else:
        entry = entry_at(tile // K_TILES, row)
        return entry, entry


@gluon.jit
def tile_blocks(tile, row, PAIR: gl.constexpr, K_TILES: gl.constexpr, PARTIAL: gl.constexpr):
    """The one or two key blocks of a tile."""
    a, b = tile_entries(tile, row, PAIR, K_TILES)
    first = key_block(a, row, PARTIAL)
    if PAIR:
        return first, key_block(b, row, PARTIAL)
    else:
        return first, first


@gluon.jit
def start_of(block, row, sizes, k_size, origin):
    """First position of a key block; reckoned where blocks are even, as a second load would wait for the first."""
    _, _, _, last, run_start, run_end = sizes
    start = origin + block * k_size
    if (block < run_start) | (block >= run_end):
        start = gl.load(row[4] + gl.minimum(block, last))
    return start


@gluon.jit
def tile_starts(
    tile, exact, blocks, row, sizes, k_size, origin,
    BLOCK_N: gl.constexpr, PAIR: gl.constexpr, K_TILES: gl.constexpr, MEANS: gl.constexpr,
):  # fmt: skip
    """Where the one or two parts of a tile begin: among the keys, or from the `exact`-th tile on among block means."""
    first = start_of(blocks[0], row, sizes, k_size, origin) + (tile % K_TILES) * BLOCK_N
    second = first
    if PAIR:
        second = start_of(blocks[1], row, sizes, k_size, origin)
    if MEANS:
        mean = (tile - exact) * BLOCK_N
        first = gl.where(tile < exact, first, mean)
        second = gl.where(tile < exact, second, mean + 64)
    return first, second


@gluon.jit
def add_bias(scores, bias, base, unit, LAYOUT: gl.constexpr):
    """Scores of block means with their bias, which came with the keys."""
    found = bias.load(gl.SliceLayout(0, LAYOUT)).to(gl.float32)
    return scores + (found * unit + base * unit)[None, :]


@gluon.jit
def hide(
    scores, tile, row, last, bits, bits_sl, words, q_block, first_row,
    PAIR: gl.constexpr, K_TILES: gl.constexpr, BLOCK_N: gl.constexpr, PARTIAL: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores with -inf at keys past a block's end, past the row's entries, and where a partial block's bit is 0."""
    kept, full, _, _, k_offsets, _, _ = row
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    a, b = tile_entries(tile, row, PAIR, K_TILES)
    bounds = k_offsets + gl.minimum(key_block(a, row, PARTIAL), last)
    size = gl.load(bounds + 1) - gl.load(bounds)
    if PAIR:
        bounds = k_offsets + gl.minimum(key_block(b, row, PARTIAL), last)
        size = gl.where(column < 64, size, gl.load(bounds + 1) - gl.load(bounds))
        entry = gl.where(column < 64, a, b)
        key = column % 64
    else:
        entry = a + column * 0
        key = column + (tile % K_TILES) * BLOCK_N
    visible = (key < size) & (entry < kept)
    scores = gl.where(visible[None, :], scores, -float("inf"))
    if PARTIAL:
        row_in_block = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        refined = visible & (entry >= full)
        offset = gl.maximum(entry - full, 0).to(gl.int64) * bits_sl + key // 32
        inside = refined[None, :] & (row_in_block < q_block)[:, None]
        packed = gl.load(bits + (row_in_block * words)[:, None] + offset[None, :], mask=inside, other=-1)
        scores = gl.where(((packed >> (key % 32)[None, :]) & 1) != 0, scores, -float("inf"))
    return scores
