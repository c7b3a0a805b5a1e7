"""Triton kernels: layer norm with modulation, and a gated residual, in one pass each. Oracles: the `_by_torch` paths.

Imported by the launcher when it first runs, never with the package.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_norm_kernel(
    x, out, weight, bias, scale, shift, x_sb, x_sn, o_sb, o_sn, m_sb, channels, eps,
    BLOCK: tl.constexpr, AFFINE: tl.constexpr, MODULATED: tl.constexpr,
):  # fmt: skip
    """out[b, n] = (norm(x[b, n]) * weight + bias) * (1 + scale[b]) + shift[b]; a program a token."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    row = tl.load(x + b * x_sb + n * x_sn + channel, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, row - tl.sum(row, 0) / channels, 0.0)
    row = centred * tl.rsqrt(tl.sum(centred * centred, 0) / channels + eps)
    if AFFINE:
        row = row * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
        row += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if MODULATED:
        factor = 1.0 + tl.load(scale + b * m_sb + channel, mask=inside, other=0.0).to(tl.float32)
        row = row * factor + tl.load(shift + b * m_sb + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * o_sb + n * o_sn + channel, row.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_gated_kernel(
    x, y, gate, out, x_sb, x_sn, y_sb, y_sn, o_sb, o_sn, g_sb, channels, BLOCK: tl.constexpr
):  # fmt: skip
    """out[b, n] = x[b, n] + y[b, n] * gate[b]; a program a token."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < channels
    base = tl.load(x + b * x_sb + n * x_sn + channel, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(y + b * y_sb + n * y_sn + channel, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(gate + b * g_sb + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + b * o_sb + n * o_sn + channel, (base + more * factor).to(out.dtype.element_ty), mask=inside)
