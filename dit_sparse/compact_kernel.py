"""Triton kernel: counts and index lists of bool rows; a program a row. Oracle: `compact_by_sort`.

The rows are `[rows, columns]` uint8, the lists of the same shape int32, the counts `[rows]` int32, all contiguous.
Imported by the launcher when it first runs, never with the package.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def compact_kernel(kept, counts, indices, columns, BLOCK: tl.constexpr):
    """Moves the indices of the kept entries to the front of the row's list, the others behind them, both in order."""
    row = tl.program_id(0).to(tl.int64)
    kept += row * columns
    indices += row * columns
    count = tl.zeros([], tl.int32)
    for first in tl.range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        count += tl.sum((tl.load(kept + column, mask=column < columns, other=0) != 0).to(tl.int32), 0)
    tl.store(counts + row, count)
    before = tl.zeros([], tl.int32)
    for first in tl.range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        keep = (tl.load(kept + column, mask=column < columns, other=0) != 0).to(tl.int32)
        # How many are kept up to and with each entry.
        rank = before + tl.cumsum(keep, 0)
        place = tl.where(keep != 0, rank - 1, count + column - rank)
        tl.store(indices + place, column, mask=column < columns)
        before += tl.sum(keep, 0)
