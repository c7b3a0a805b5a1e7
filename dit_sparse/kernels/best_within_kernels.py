"""Triton kernels: the blocks of most worth that a budget of query-key pairs pays for. Oracle: `best_within`' sort.

A radix search over the bits of float32, which rise with floats that are not negative: each pass counts the pairs above
16 thresholds, and so settles 4 bits of the largest threshold that spends too much. Blocks above it are kept, and of
those that equal it the first that are still paid for. Tensors are `[B, H, Mq, Mk]` contiguous; counts are int64, so the
order of adding does not matter. Imported by their launcher when that first runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

DIGITS = tl.constexpr(16)
FIRST_SHIFT = tl.constexpr(28)


@triton.jit
def keys_kernel(mass, q_text, k_text, q_sizes, k_sizes, keys, free, q_blocks, k_blocks, BLOCK: tl.constexpr):
    """Bits of a row's mass a pair, -1 where the block is kept anyway: text, and the heaviest; `free` counts those."""
    row = tl.program_id(0).to(tl.int64)
    i, columns = row % q_blocks, tl.arange(0, BLOCK)
    inside = columns < k_blocks
    weight = tl.load(mass + row * k_blocks + columns, mask=inside, other=-float("inf"))
    area = tl.load(q_sizes + i).to(tl.int64) * tl.load(k_sizes + columns, mask=inside, other=0)
    best = tl.argmax(weight, 0, tie_break_left=True)
    text = (tl.load(k_text + columns, mask=inside, other=0) | tl.load(q_text + i)) != 0
    forced = text | (columns == best)
    worth = tl.div_rn(weight, tl.maximum(area, 1).to(tl.float32))
    # -0 and what is no number may have a sign.
    found = tl.where(forced, -1, worth.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.store(keys + row * k_blocks + columns, found, mask=inside)
    tl.store(free + row, tl.sum(tl.where(forced & inside, area, 0), 0))


@triton.jit
def settled(counts, budget, PASSES: tl.constexpr):
    """The largest threshold that spends more than `budget`, as far as its bits are known, and what those above cost."""
    digits = tl.arange(0, DIGITS)
    threshold = 0
    spent = tl.zeros([], tl.int64)
    for p in tl.static_range(PASSES):
        found = tl.load(counts + p * DIGITS + digits)
        within = found.to(tl.float64) <= budget
        # The sign is no part of the first digit.
        beyond = (digits > 0) & (digits < (DIGITS // 2 if p == 0 else DIGITS)) & (within == 0)
        threshold = threshold | (tl.sum(beyond.to(tl.int32), 0) << (FIRST_SHIFT - 4 * p))
        spent = tl.maximum(spent, tl.max(tl.where(within, found, 0), 0))
    return threshold, spent


@triton.jit
def count_kernel(
    keys, q_sizes, k_sizes, counts, budgets, rows, q_blocks, k_blocks,
    PASS: tl.constexpr, PASSES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs of the blocks of `ROWS` rows that reach each threshold of a pass."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    counts += b * PASSES * DIGITS
    digits = tl.arange(0, DIGITS)
    threshold, _ = settled(counts, tl.load(budgets + b), PASS)
    thresholds = threshold | (digits << (FIRST_SHIFT - 4 * PASS))
    if PASS == 0:
        thresholds = tl.where(digits < DIGITS // 2, thresholds, 0x7FFFFFFF)
    pairs = tl.zeros([DIGITS], tl.int64)
    for row in tl.range(first, tl.minimum(first + ROWS, rows)):
        # Keys of one row are no more than tokens, so 32 bits hold them.
        tokens = tl.zeros([BLOCK, DIGITS], tl.int32)
        for start in tl.range(0, k_blocks, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < k_blocks
            key = tl.load(keys + (b * rows + row) * k_blocks + columns, mask=inside, other=-1)
            sizes = tl.load(k_sizes + columns, mask=inside, other=0)
            tokens += tl.where(key[:, None] >= thresholds[None, :], sizes[:, None], 0)
        pairs += tl.sum(tokens, 0).to(tl.int64) * tl.load(q_sizes + row % q_blocks)
    tl.atomic_add(counts + PASS * DIGITS + digits, pairs, sem="relaxed")


@triton.jit
def ties_kernel(
    keys, q_sizes, k_sizes, counts, budgets, ties, rows, q_blocks, k_blocks,
    PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pairs of a row's blocks that equal the threshold."""
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    threshold, _ = settled(counts + b * PASSES * DIGITS, tl.load(budgets + b), PASSES)
    columns = tl.arange(0, BLOCK)
    inside = columns < k_blocks
    key = tl.load(keys + (b * rows + row) * k_blocks + columns, mask=inside, other=-1)
    sizes = tl.load(k_sizes + columns, mask=inside, other=0).to(tl.int64)
    tl.store(ties + b * rows + row, tl.sum(tl.where(key == threshold, sizes, 0), 0) * tl.load(q_sizes + row % q_blocks))


@triton.jit
def keep_kernel(
    keys, q_sizes, k_sizes, counts, budgets, before, kept, rows, q_blocks, k_blocks,
    PASSES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What is kept of a row; `before` counts the pairs of earlier rows' blocks that equal the threshold."""
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    budget = tl.load(budgets + b)
    counts += b * PASSES * DIGITS
    threshold, spent = settled(counts, budget, PASSES)
    columns = tl.arange(0, BLOCK)
    inside = columns < k_blocks
    place = (b * rows + row) * k_blocks + columns
    key = tl.load(keys + place, mask=inside, other=-1)
    sizes = tl.load(k_sizes + columns, mask=inside, other=0).to(tl.int64)
    equal = tl.cumsum(tl.where(key == threshold, sizes, 0), 0) * tl.load(q_sizes + row % q_blocks)
    paid = (spent + tl.load(before + b * rows + row) + equal).to(tl.float64) <= budget
    # Where the budget pays for all blocks no threshold spends too much.
    threshold = tl.where(tl.load(counts).to(tl.float64) <= budget, -1, threshold)
    found = (key < 0) | (key > threshold) | ((key == threshold) & paid)
    tl.store(kept + place, found.to(tl.uint8), mask=inside)
