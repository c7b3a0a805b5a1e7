"""Triton kernel: rows of tokens gathered by an index, for up to three tensors at once. Oracle: torch's gather.

Imported by the launcher when it first runs, never with the package.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gather_kernel(
    x0, x1, x2, y0, y1, y2, index,
    x_sb, x_sh, x_sn, y_sb, y_sh, y_sn, i_sb, i_sh, heads, tokens,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """y[b, h, n] = x[b, h, index[b, h, n]]; programs over tiles of tokens, batch and head, and tensors."""
    b = (tl.program_id(1) // heads).to(tl.int64)
    h = (tl.program_id(1) % heads).to(tl.int64)
    x, y = x0, y0
    if tl.program_id(2) == 1:
        x, y = x1, y1
    elif tl.program_id(2) == 2:
        x, y = x2, y2
    to = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = to < tokens
    source = tl.load(index + b * i_sb + h * i_sh + to, mask=inside, other=0)
    channel = tl.arange(0, BLOCK_D)
    mask = inside[:, None] & (channel < D)[None, :]
    rows = tl.load(x + b * x_sb + h * x_sh + source[:, None] * x_sn + channel[None, :], mask=mask)
    tl.store(y + b * y_sb + h * y_sh + to[:, None] * y_sn + channel[None, :], rows, mask=mask)
