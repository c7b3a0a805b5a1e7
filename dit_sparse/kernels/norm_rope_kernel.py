"""Triton kernel: RMS norm and rotary embedding of queries or keys in one pass. Oracle: `norm_rope_by_torch`.

Imported by the launcher when it first runs, never with the package.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norm_rope_kernel(
    x, out, weight, cos, sin, x_sb, x_sn, x_sh, o_sb, o_sn, o_sh, c_sn, s_sn, heads, eps,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, PER_HEAD: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program takes all heads of one token, `[heads, D]`; pairs of channels stand beside each other."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_H)[:, None]
    channel = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < heads) & (channel < D)
    row = tl.load(x + b * x_sb + n * x_sn + head * x_sh + channel, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(row * row, 1)
    if PER_HEAD:
        scale = tl.rsqrt(squares / D + eps)[:, None]
        factor = tl.load(weight + channel, mask=channel < D, other=0.0).to(tl.float32)
    else:
        scale = tl.rsqrt(tl.sum(squares, 0) / (heads * D) + eps)
        factor = tl.load(weight + head * D + channel, mask=inside, other=0.0).to(tl.float32)
    # The norm's result is rounded, as it is where norm and rotation are two operations.
    row = (row * scale * factor).to(out.dtype.element_ty).to(tl.float32)
    if ROTATE:
        even, odd = tl.split(tl.reshape(row, [BLOCK_H, BLOCK_D // 2, 2]))
        angle = 2 * tl.arange(0, BLOCK_D // 2)[None, :]
        c = tl.load(cos + n * c_sn + angle, mask=angle < D, other=0.0).to(tl.float32)
        s = tl.load(sin + n * s_sn + angle + 1, mask=angle < D, other=0.0).to(tl.float32)
        row = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [BLOCK_H, BLOCK_D])
    tl.store(out + b * o_sb + n * o_sn + head * o_sh + channel, row.to(out.dtype.element_ty), mask=inside)
