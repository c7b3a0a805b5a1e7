"""The remainder of the blocks that a plan does not keep; `AttentionPlan` has its definition.

`remainder_terms` makes what a kernel needs of it. `add_remainder` adds it to the output and row sums of the kept blocks
in plain torch: the remainder is attention to the blocks' means with a bias, and two attentions over disjoint keys are
one, weighted by their row sums.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_sparse.kernels.block_layout import BlockLayout
from dit_sparse.kernels.moments import block_moments
from dit_sparse.types import AttentionPlan, Remainder

__all__ = ["RemainderTerms", "add_remainder", "remainder_terms"]

LARGEST_SPREAD = 2.0
"""Of `m_Ij`; above it a block leaves no remainder for a query block. The scores then vary by 2 around their mean."""

_CHUNK_SCORES = 1 << 19


@dataclass(frozen=True)
class RemainderTerms:
    """What stands in for the blocks that are not kept.

    Args:
        keys, values: `[B, H, Mk, D]` and `[B, H, Mk, DV]` block means.
        bias: `[B, H, Mq, Mk]` added to the scores of `keys`; -inf where a block leaves no remainder.
        slopes: `[B, H, Mq, D, DV]` `scale * C_I`; `None` for "mean".
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    slopes: Tensor | None


def remainder_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: BlockLayout,
    k_layout: BlockLayout,
    kept: Tensor,
    scale: float,
    remainder: Remainder,
) -> RemainderTerms:
    """The terms of `remainder`, in float32 (float64 for float64), `slopes` in the dtype of `k`.

    Args:
        q: `[B, H, Nq, D]` in the plan's query order.
        k, v: `[B, H, Nk, D]`, `[B, H, Nk, DV]` in the plan's key order.
        q_layout, k_layout: the orders' blocks.
        kept: `[B|1, H|1, Mq, Mk]` bool, blocks kept whole or in part.
        scale: factor of the scores.
        remainder: "mean", "value" or "mass".
    """
    first_order = remainder != "mean"
    keys = block_moments(k, k_layout, v, products=first_order)
    queries = block_moments(q, q_layout, centred=False)
    assert keys.v_mean is not None
    sizes = k_layout.sizes.to(keys.mean.dtype)[..., None, :]
    spread = queries.square @ (keys.square * (scale * scale / 2)).transpose(-1, -2)
    out = kept | (spread > LARGEST_SPREAD) | (sizes == 0)
    log_sizes = sizes.clamp(min=1).log()
    bias = log_sizes + torch.minimum(spread, log_sizes) if remainder == "mass" else log_sizes.expand(spread.shape)
    bias = bias.masked_fill(out, -math.inf)
    if keys.products is None:
        return RemainderTerms(keys.mean, keys.v_mean, bias, None)
    weights = _softmax((queries.mean * scale) @ keys.mean.transpose(-1, -2) + bias)
    products = keys.products.flatten(3)
    slopes = (weights.to(products.dtype) @ products).unflatten(-1, keys.products.shape[3:])
    return RemainderTerms(keys.mean, keys.v_mean, bias, slopes * scale)


def _softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; zeros in a row of -inf."""
    empty = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def add_remainder(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the kept blocks and the remainder of the others.

    Args:
        q, k, v: `[B, H, N, D]` in the plan's orders, in float32, or float64.
        plan: with a remainder other than "none".
        scale: factor of the scores.
        out, lse: `[B, H, Nq, DV]` and `[B, H, Nq]`, of the kept blocks.

    Returns:
        Output in float32, or float64 for float64, and the row sums with the remainder in them.
    """
    kept = plan.block_mask.kept_blocks.expand(*q.shape[:2], -1, -1)
    merged, total = torch.empty_like(out, dtype=lse.dtype), torch.empty_like(lse)
    # Head by head, because the slopes of all heads would take much room.
    for b, h in itertools.product(*map(range, q.shape[:2])):
        head = (slice(b, b + 1), slice(h, h + 1))
        q_layout, k_layout = (BlockLayout.of_head(order, b, h) for order in (plan.q_order, plan.kv_order))
        terms = remainder_terms(q[head], k[head], v[head], q_layout, k_layout, kept[head], scale, plan.remainder)
        found, sums = _attend(q[head].to(lse.dtype), q_layout, terms, scale)
        merged[head], total[head] = _merge(out[head].to(lse.dtype), lse[head], found, sums)
    return merged, total


def _attend(q: Tensor, layout: BlockLayout, terms: RemainderTerms, scale: float) -> tuple[Tensor, Tensor]:
    """The remainder alone of one head: output `[1, 1, Nq, DV]` and row sums `[1, 1, Nq]`."""
    queries = layout.split(q)[0, 0]
    keys, values, bias = (terms.keys * scale)[0, 0].T, terms.values[0, 0], terms.bias[0, 0]
    slopes = None if terms.slopes is None else terms.slopes[0, 0].to(q.dtype)
    out, sums = q.new_empty(*queries.shape[:2], values.shape[-1]), q.new_empty(queries.shape[:2])
    chunk = max(1, _CHUNK_SCORES // (queries.shape[1] * max(1, values.shape[0])))
    for start in range(0, queries.shape[0], chunk):
        part = slice(start, start + chunk)
        own = bias[part, None]
        empty = own.isneginf().all(-1, keepdim=True)
        scores = torch.baddbmm(own.masked_fill(empty, 0.0), queries[part], keys.expand(len(own), -1, -1))
        weights = scores.softmax(-1)
        found = weights @ values
        out[part] = found if slopes is None else torch.baddbmm(found, queries[part], slopes[part])
        # The row sum is the largest score less the log of its weight.
        sums[part] = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(empty[..., 0], -math.inf)
    return layout.join(out[None, None]), layout.join(sums[None, None, ..., None])[..., 0]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One attention out of two over disjoint keys."""
    alone = other_lse.isneginf()  # rows without a remainder, which stay as they are
    total = torch.logaddexp(lse.masked_fill(alone, 0.0), other_lse.masked_fill(alone, 0.0))
    share = (other_lse - total).exp()[..., None]
    return torch.lerp(out, other.masked_fill(alone[..., None], 0.0), share), torch.where(alone, lse, total)
