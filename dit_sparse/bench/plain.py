"""Attention under a plan in plain torch, in any dtype: what kernels are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.remainder import RemainderTerms, remainder_terms
from dit_sparse.types import AttentionPlan

__all__ = ["exact_terms", "plain_attention"]


def exact_terms(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> RemainderTerms | None:
    """The terms of the plan's remainder in float64; `None` without one. Arguments as in `Backend.forward`."""
    if plan.remainder == "none":
        return None
    rows, columns = (BlockLayout(o.offsets, o.geometry, o.num_tokens) for o in (plan.q_order, plan.kv_order))
    q, k, v, kept = q.double(), k.double(), v.double(), plan.block_mask.kept_blocks
    return remainder_terms(q, k, v, rows, columns, kept, scale, plan.remainder, plan.head_remainders)


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    terms: RemainderTerms | None = None,
    blocks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked attention of some query rows and their row sums, computed in the dtype of the inputs.

    Args:
        q, k, v: `[B, H, R, D]` rows, `[B, H, N, D]` keys and values.
        keep: `[B|1, H|1, R, N]` bool, or `None` to keep all.
        scale: factor of the scores.
        terms: of a remainder, of the same batches and heads.
        blocks: `[B|1, H|1, R]` int64 query block of each row; needed with `terms`.

    Returns:
        Output `[B, H, R, DV]`, and row sums `[B, H, R]` in float32 (float64 for float64); zeros and -inf for rows that
        keep nothing.
    """
    scores = q @ k.transpose(-1, -2) * scale
    scores = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
    if terms is not None and blocks is not None:
        bias = terms.bias.gather(2, blocks.expand(*q.shape[:3])[..., None].expand(-1, -1, -1, terms.bias.shape[-1]))
        scores = torch.cat([scores, q @ terms.keys.to(q.dtype).transpose(-1, -2) * scale + bias.to(q.dtype)], -1)
        v = torch.cat([v, terms.values.to(v.dtype)], 2)
    weights = scores.softmax(-1).nan_to_num(0.0)
    out = weights @ v
    if terms is not None and terms.slopes is not None and blocks is not None:
        b, h = (torch.arange(n, device=q.device) for n in q.shape[:2])
        slopes = terms.slopes.to(q.dtype)[b[:, None, None], h[None, :, None], blocks]
        out = out + weights[..., k.shape[2] :].sum(-1, keepdim=True) * (q[..., None, :] @ slopes)[..., 0, :]
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, scores.to(compute).logsumexp(-1)
