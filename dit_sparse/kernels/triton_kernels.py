"""Triton kernel: block-sparse attention, and the pieces that other kernels share.

`forward_kernel`, for a query tile: out = softmax(scale * q K^T) V over the kept keys, with the running maximum and sum
of FlashAttention-2 (arXiv 2307.08691, algorithm 1), in base 2. A remainder follows in the same pass: the means of all
blocks are more keys, with a bias that is -inf for those kept. Oracle: `reference`.

Grids are (query tiles, heads, batch). q, k, v, out are `[B, H, N, D]`, contiguous in the last dimension and with any
strides elsewhere; lists and offsets are `[B|1, H|1, ...]`. Imported by the launchers when they first run, never with
the package.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(base, positions, end, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Tokens `[positions, BLOCK_D]`; zeros from `end` on and beyond `D` channels."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + positions.to(tl.int64)[:, None] * stride + channels[None, :]
    if MASKED and D == BLOCK_D:
        return tl.load(pointers, mask=(positions < end)[:, None], other=0.0)
    if MASKED:
        return tl.load(pointers, mask=(positions < end)[:, None] & (channels < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(channels < D)[None, :], other=0.0)


@triton.jit
def multiply(a, b, UPCAST: tl.constexpr):
    """`a @ b` in float32; the interpreter has no bfloat16 product, so operands go up first there."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def score_tile(
    q, k, positions, end, k_stride, allowed,
    D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Products with a tile of keys; -inf past the block's `end` and, in a partial block, where nothing is `allowed`."""
    keys = load_tile(k, positions, end, k_stride, D, BLOCK_D, MASKED)
    scores = multiply(q, tl.trans(keys), UPCAST)
    if MASKED:
        scores = tl.where((positions < end)[None, :], scores, -float("inf"))
    if PARTIAL:
        scores = tl.where(allowed, scores, -float("inf"))
    return scores


@triton.jit
def attend_tile(
    q, m, total, acc, k, v, start, end, k_stride, v_stride, scale, allowed,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, PARTIAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output after one more tile of keys, positions `start` to `end`."""
    positions = start + tl.arange(0, BLOCK_N)
    scores = score_tile(q, k, positions, end, k_stride, allowed, D, BLOCK_D, MASKED, PARTIAL, UPCAST)
    peak = tl.maximum(m, tl.max(scores, 1) * scale)
    shift = peak
    if MASKED or PARTIAL:
        # A row that has seen no key yet: -inf less -inf would be NaN.
        shift = tl.where(peak == -float("inf"), 0.0, peak)
    weights = tl.exp2(scores * scale - shift[:, None])
    keep = tl.exp2(m - shift)
    values = load_tile(v, positions, end, v_stride, DV, BLOCK_DV, MASKED)
    acc = acc * keep[:, None] + multiply(weights.to(values.dtype), values, UPCAST)
    return peak, total * keep + tl.sum(weights, 1), acc


@triton.jit
def plain_entries(indices, count, run_start, run_end):
    """Which of the `count` ascending `indices` are from `run_start` to `run_end`: blocks that need no mask."""
    last = tl.maximum(count - 1, 0)
    plain_start = 0
    while (plain_start < count) & (tl.load(indices + tl.minimum(plain_start, last)) < run_start):
        plain_start += 1
    plain_end = count
    while (plain_end > plain_start) & (tl.load(indices + tl.maximum(plain_end - 1, 0)) >= run_end):
        plain_end -= 1
    return plain_start, plain_end


@triton.jit
def attend_kept(
    q, m, total, acc, k, v, indices, count, k_offsets, run_start, run_end, k_size, k_stride, v_stride, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    K_TILES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output after the `count` key blocks of `indices`, which ascend and are kept whole."""
    last = tl.maximum(count - 1, 0)
    plain_start, plain_end = plain_entries(indices, count, run_start, run_end)
    origin = tl.load(k_offsets + run_start) - run_start * k_size
    first = origin + tl.load(indices + tl.minimum(plain_start, last)) * k_size
    for i in tl.range(0, (plain_end - plain_start) * K_TILES):
        # Where the next tile lies is read a step ahead: copies that wait for another load are not pipelined.
        entry = tl.minimum(plain_start + (i + 1) // K_TILES, last)
        following = origin + tl.load(indices + entry) * k_size + ((i + 1) % K_TILES) * BLOCK_N
        m, total, acc = attend_tile(
            q, m, total, acc, k, v, first, 0, k_stride, v_stride, scale, None,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, False, False, UPCAST,
        )  # fmt: skip
        first = following
    masked = (plain_start + count - plain_end) * K_TILES
    for i in tl.range(0, masked):
        # Those before the run, then those after it.
        entry = i // K_TILES
        bound = k_offsets + tl.load(indices + tl.where(entry < plain_start, entry, entry - plain_start + plain_end))
        m, total, acc = attend_tile(
            q, m, total, acc, k, v, tl.load(bound) + (i % K_TILES) * BLOCK_N, tl.load(bound + 1), k_stride, v_stride,
            scale, None, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, False, UPCAST,
        )  # fmt: skip
    return m, total, acc


@triton.jit
def add_means(
    scores, m, total, tail, acc, values, blocks, num_blocks, v_stride,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Running maximum, sum and output after a tile of block means, whose `scores` have their bias and are in base 2.

    `tail` is the means' part of the sum, rescaled with it.
    """
    peak = tl.maximum(m, tl.max(scores, 1))
    # A row that has seen no key yet: -inf less -inf would be NaN.
    shift = tl.where(peak == -float("inf"), 0.0, peak)
    weights = tl.exp2(scores - shift[:, None])
    keep = tl.exp2(m - shift)
    found = load_tile(values, blocks, num_blocks, v_stride, DV, BLOCK_DV, True)
    acc = acc * keep[:, None] + multiply(weights.to(found.dtype), found, UPCAST)
    share = tl.sum(weights, 1)
    return peak, total * keep + share, tail * keep + share, acc


@triton.jit
def attend_means(
    q, m, total, tail, acc, keys, values, bias, base, start, num_blocks, k_stride, v_stride, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """As `attend_tile`, for the means of blocks from `start` on."""
    blocks = start + tl.arange(0, BLOCK_N)
    means = load_tile(keys, blocks, num_blocks, k_stride, D, BLOCK_D, True)
    own = tl.load(bias + blocks, mask=blocks < num_blocks, other=-float("inf")).to(tl.float32) + base
    own *= 1.4426950408889634
    scores = multiply(q, tl.trans(means), UPCAST) * scale + own[None, :]
    return add_means(scores, m, total, tail, acc, values, blocks, num_blocks, v_stride, DV, BLOCK_DV, UPCAST)


@triton.jit
def multiply_slopes(
    q, slopes, rows, end, q_stride, slope_stride,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Query rows times `[D, DV]`, some channels at a time: a matrix of 256 x 256 would not fit in shared memory."""
    SPAN: tl.constexpr = BLOCK_D if BLOCK_D < 32 else 32
    found = tl.zeros([rows.shape[0], BLOCK_DV], tl.float32)
    for first in tl.range(0, D, SPAN, num_stages=1):
        channels = first + tl.arange(0, SPAN)
        pointers = q + rows.to(tl.int64)[:, None] * q_stride + channels[None, :]
        part = tl.load(pointers, mask=(rows < end)[:, None] & (channels < D)[None, :], other=0.0)
        found += multiply(part, load_tile(slopes, channels, D, slope_stride, DV, BLOCK_DV, True), UPCAST)
    return found


@triton.jit
def allowed_pairs(bits, rows, tile, q_block, words, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """`[BLOCK_M, BLOCK_N]` bool of a block's packed bits, `words` int32 a row, from key `tile * BLOCK_N` on.

    One load a word, which is then spread: a load a pair would be pipelined as a tile of int32 of its own.
    """
    SPAN: tl.constexpr = BLOCK_N if BLOCK_N < 32 else 32
    WORDS: tl.constexpr = BLOCK_N // SPAN
    first = tile * BLOCK_N
    word = first // 32 + tl.arange(0, WORDS)
    inside = (rows < q_block)[:, None] & (word < words)[None, :]
    packed = tl.load(bits + rows[:, None] * words + word[None, :], mask=inside, other=0)
    bit = first % 32 + tl.arange(0, SPAN)
    return tl.reshape(((packed[:, :, None] >> bit[None, None, :]) & 1) != 0, [BLOCK_M, BLOCK_N])


# Without this every other mask or batch size would be compiled for its strides anew.
PLAIN_NUMBERS = [
    "lse_sb", "lse_sh", "qo_sb", "qo_sh", "ko_sb", "ko_sh", "c_sb", "c_sh", "i_sb", "i_sh", "i_sm", "pc_sb", "pc_sh",
    "pi_sb", "pi_sh", "pi_sm", "bits_sb", "bits_sh", "bits_sm", "bits_sl", "words", "q_block", "run_start", "run_end",
    "k_size", "num_k_blocks", "bias_sb", "bias_sh", "bias_sm",
]  # fmt: skip


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def forward_kernel(
    q, k, v, out, lse,
    q_offsets, k_offsets, counts, indices, partial_counts, partial_indices, bits, mean_k, mean_v, bias, slopes,
    q_sb, q_sh, q_sn, k_sb, k_sh, k_sn, v_sb, v_sh, v_sn, o_sb, o_sh, o_sn, lse_sb, lse_sh,
    qo_sb, qo_sh, ko_sb, ko_sh, c_sb, c_sh, i_sb, i_sh, i_sm, pc_sb, pc_sh, pi_sb, pi_sh, pi_sm,
    bits_sb, bits_sh, bits_sm, bits_sl, words, q_block, run_start, run_end, k_size, scale,
    num_k_blocks, base, mk_sb, mk_sh, mk_sm, mv_sb, mv_sh, mv_sm, bias_sb, bias_sh, bias_sm, slope_sb, slope_sh,
    slope_sm, slope_sd, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, Q_TILES: tl.constexpr, K_TILES: tl.constexpr,
    PARTIAL: tl.constexpr, RETURN_LSE: tl.constexpr, MEANS: tl.constexpr, SLOPES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Output and row sums of one query tile; key blocks `run_start` to `run_end` fill their tiles and need no mask."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    block, part = tl.program_id(0) // Q_TILES, tl.program_id(0) % Q_TILES
    bounds = q_offsets + b * qo_sb + h * qo_sh + block
    start, end = tl.load(bounds) + part * BLOCK_M, tl.load(bounds + 1)
    if start >= end:
        return
    rows = start + tl.arange(0, BLOCK_M)
    queries = load_tile(q + b * q_sb + h * q_sh, rows, end, q_sn, D, BLOCK_D, True)
    k += b * k_sb + h * k_sh
    v += b * v_sb + h * v_sh
    k_offsets += b * ko_sb + h * ko_sh
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    count = tl.load(counts + b * c_sb + h * c_sh + block)
    indices += b * i_sb + h * i_sh + block * i_sm
    m, total, acc = attend_kept(
        queries, m, total, acc, k, v, indices, count, k_offsets, run_start, run_end, k_size, k_sn, v_sn, scale,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, K_TILES, UPCAST,
    )  # fmt: skip
    if PARTIAL:
        partial = tl.load(partial_counts + b * pc_sb + h * pc_sh + block)
        partial_indices += b * pi_sb + h * pi_sh + block * pi_sm
        bits += b * bits_sb + h * bits_sh + block * bits_sm
        last = tl.maximum(partial - 1, 0)
        bound = k_offsets + tl.load(partial_indices)
        k_start, k_end = tl.load(bound), tl.load(bound + 1)
        for i in tl.range(0, partial * K_TILES):
            bound = k_offsets + tl.load(partial_indices + tl.minimum((i + 1) // K_TILES, last))
            start_next, end_next = tl.load(bound) + ((i + 1) % K_TILES) * BLOCK_N, tl.load(bound + 1)
            allowed = allowed_pairs(
                bits + (i // K_TILES) * bits_sl, part * BLOCK_M + tl.arange(0, BLOCK_M), i % K_TILES, q_block, words,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            m, total, acc = attend_tile(
                queries, m, total, acc, k, v, k_start, k_end, k_sn, v_sn, scale, allowed,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, True, True, UPCAST,
            )  # fmt: skip
            k_start, k_end = start_next, end_next
    if MEANS:
        tail = tl.zeros([BLOCK_M], tl.float32)
        mean_k += b * mk_sb + h * mk_sh
        mean_v += b * mv_sb + h * mv_sh
        bias += b * bias_sb + h * bias_sh + block.to(tl.int64) * bias_sm
        for i in tl.range(0, num_k_blocks, BLOCK_N):
            m, total, tail, acc = attend_means(
                queries, m, total, tail, acc, mean_k, mean_v, bias, base, i, num_k_blocks, mk_sm, mv_sm, scale,
                D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, UPCAST,
            )  # fmt: skip
        if SLOPES:
            slopes += b * slope_sb + h * slope_sh + block.to(tl.int64) * slope_sm
            q += b * q_sb + h * q_sh
            acc += tail[:, None] * multiply_slopes(
                q, slopes, rows, end, q_sn, slope_sd, D, DV, BLOCK_D, BLOCK_DV, UPCAST
            )

    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    channels = tl.arange(0, BLOCK_DV)
    pointers = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sn + channels[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(rows < end)[:, None] & (channels < DV)[None, :])
    if RETURN_LSE:
        sums = tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
        tl.store(lse + b * lse_sb + h * lse_sh + rows, sums, mask=rows < end)
