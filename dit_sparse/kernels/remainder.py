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
from dit_sparse.kernels.moments import Moments, block_moments, by_kernel
from dit_sparse.kernels.triton_terms import weigh_by_triton
from dit_sparse.types import REMAINDERS, AttentionPlan, Remainder

__all__ = ["HeadRemainder", "RemainderTerms", "add_remainder", "head_remainder", "remainder_terms", "score_spread"]

LARGEST_SPREAD = 2.0
"""Of `m_Ij`; above it a block leaves no remainder for a query block. The scores then vary by 2 around their mean."""

_CHUNK_SCORES = 1 << 19


@dataclass(frozen=True)
class RemainderTerms:
    """What stands in for the blocks that are not kept.

    Args:
        keys, values: `[B, H, Mk, D]` and `[B, H, Mk, DV]` block means.
        bias: `[B, H, Mq, Mk]` added to the scores of `keys`; -inf where a block leaves no remainder. Where it is
            compact, more of that in columns past `Mk`.
        slopes: `[B, H, Mq, D, DV]` `scale * C_I`; `None` for "mean".
        base: what `bias` lacks everywhere; 0 unless it is compact.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    slopes: Tensor | None
    base: float = 0.0


def remainder_terms(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_layout: BlockLayout,
    k_layout: BlockLayout,
    kept: Tensor,
    scale: float,
    remainder: Remainder,
    head_remainders: Tensor | None = None,
    *,
    compact: bool = False,
) -> RemainderTerms:
    """The terms of `remainder`, in float32 (float64 for float64), `slopes` in the dtype of `k`.

    Args:
        q: `[B, H, Nq, D]` in the plan's query order.
        k, v: `[B, H, Nk, D]`, `[B, H, Nk, DV]` in the plan's key order.
        q_layout, k_layout: the orders' blocks.
        kept: `[B|1, H|1, Mq, Mk]` bool, blocks kept whole or in part.
        scale: factor of the scores.
        remainder: "mean", "value" or "mass".
        head_remainders: as in `AttentionPlan`.
        compact: the means in the dtypes of `k` and `v`, and on a GPU the bias in float16 less the log of the largest
            block's size, so that it is exact for most.
    """
    first_order = remainder != "mean"
    keys = block_moments(k, k_layout, v, products=first_order, rounded=compact)
    queries = block_moments(q, q_layout, centred=False)
    assert keys.v_mean is not None
    weights: Tensor | None
    if q.element_size() == 2 and by_kernel(q, k, v):
        base = math.log(max(1, k_layout.blocks.largest)) if compact else 0.0
        dtype = torch.float16 if compact else torch.float32
        given = queries, keys, k_layout, kept, scale, remainder, head_remainders
        bias, weights = weigh_by_triton(*given, LARGEST_SPREAD, base, dtype)
        bias = bias if compact else bias[..., : keys.mean.shape[2]]
    else:
        base = 0.0
        bias = _bias(queries, keys, k_layout, kept, scale, remainder, head_remainders)
        weights = _weights(queries, keys, bias, scale, head_remainders) if first_order else None
    means = keys.mean, keys.v_mean
    if keys.rounded is not None and keys.v_rounded is not None:
        means = keys.rounded, keys.v_rounded
    slopes = None
    if keys.products is not None and weights is not None:
        slopes = (weights @ keys.products.flatten(3)).unflatten(-1, keys.products.shape[3:])
    return RemainderTerms(*means, bias, slopes, base)


def score_spread(queries: Moments, keys: Moments, scale: float) -> Tensor:
    """`m_Ij` `[B, H, Mq, Mk]`: half the variance of a block's scores, from its keys' in each channel."""
    return queries.square @ (keys.square * (scale * scale / 2)).transpose(-1, -2)


def _bias(
    queries: Moments,
    keys: Moments,
    k_layout: BlockLayout,
    kept: Tensor,
    scale: float,
    remainder: Remainder,
    head_remainders: Tensor | None = None,
) -> Tensor:
    """`[B, H, Mq, Mk]` added to the scores of the blocks' means."""
    log_sizes = k_layout.sizes.to(keys.mean.dtype).log()[..., None, :]  # -inf for an empty block
    spread = score_spread(queries, keys, scale)
    out = (spread > LARGEST_SPREAD).logical_or_(kept)
    bias = log_sizes + torch.minimum(spread, log_sizes) if remainder == "mass" else log_sizes.expand(spread.shape)
    if head_remainders is not None:
        own = head_remainders[..., None, None]
        bias = torch.where(own < REMAINDERS.index("mass"), log_sizes, bias)
        out |= own < REMAINDERS.index("mean")
    return bias.masked_fill(out, -math.inf)


def _weights(
    queries: Moments, keys: Moments, bias: Tensor, scale: float, head_remainders: Tensor | None = None
) -> Tensor:
    """`[B, H, Mq, M']`, `scale` times what each block is worth to the mean query, in the dtype of the products.

    Zeros in a row without a remainder, in heads with a lower one than "value", and past the last block where there are
    more products.
    """
    assert keys.products is not None
    scores = (queries.mean * scale) @ keys.mean.transpose(-1, -2) + bias
    empty = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0) * scale
    if head_remainders is not None:
        weights = weights * (head_remainders[..., None, None] >= REMAINDERS.index("value"))
    columns = keys.products.shape[2]
    return torch.nn.functional.pad(weights, (0, columns - weights.shape[-1])).to(keys.products.dtype)


@dataclass(frozen=True)
class HeadRemainder:
    """The remainder of one head, in the dtype that it is computed in: keys with a bias beside the kept ones.

    Args:
        keys: `[Mk, D]` block means.
        values: `[Mk, DV]`.
        bias: `[Mq, Mk]`.
        slopes: `[Mq, D, DV]` `scale * C_I`; `None` for "mean".
        layout: the query blocks.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    slopes: Tensor | None
    layout: BlockLayout


def head_remainder(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, batch: int, head: int, dtype: torch.dtype
) -> HeadRemainder:
    """The remainder of one head, as the slopes of all take much room.

    Args:
        q, k, v: `[1, 1, N, D]` of this head, in the plan's orders.
        plan, scale: as in `Backend.forward`.
        batch, head: which it is.
        dtype: that the remainder is computed in.
    """
    q_layout, k_layout = (BlockLayout.of_head(order, batch, head) for order in (plan.q_order, plan.kv_order))
    kept = plan.block_mask.kept_blocks
    kept = kept[batch % kept.shape[0], head % kept.shape[1]][None, None]
    own = plan.head_remainders
    if own is not None:
        own = own[batch % own.shape[0], head % own.shape[1]][None, None]
    terms = remainder_terms(q, k, v, q_layout, k_layout, kept, scale, plan.remainder, own)
    slopes = None if terms.slopes is None else terms.slopes[0, 0].to(dtype)
    keys, values, bias = (x[0, 0].to(dtype) for x in (terms.keys, terms.values, terms.bias))
    return HeadRemainder(keys, values, bias, slopes, q_layout)


def add_remainder(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention to the kept blocks and the remainder of the others.

    Args:
        q, k, v: `[B, H, N, D]` in the plan's orders.
        plan: with a remainder other than "none".
        scale: factor of the scores.
        out, lse: `[B, H, Nq, DV]` and `[B, H, Nq]`, of the kept blocks.

    Returns:
        Output and row sums with the remainder in them, in the dtype of `lse`.
    """
    merged, total = torch.empty_like(out, dtype=lse.dtype), torch.empty_like(lse)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        own_q, own_k, own_v = (x[b : b + 1, h : h + 1] for x in (q, k, v))
        head = head_remainder(own_q, own_k, own_v, plan, scale, b, h, lse.dtype)
        found, sums = _attend(q[b, h].to(lse.dtype), head, scale)
        merged[b, h], total[b, h] = _merge(out[b, h].to(lse.dtype), lse[b, h], found, sums)
    return merged, total


def _attend(q: Tensor, head: HeadRemainder, scale: float) -> tuple[Tensor, Tensor]:
    """The remainder alone: output `[Nq, DV]` and row sums `[Nq]` of the queries `[Nq, D]`."""
    queries = head.layout.split(q[None, None])[0, 0]
    out, sums = q.new_empty(*queries.shape[:2], head.values.shape[-1]), q.new_empty(queries.shape[:2])
    chunk = max(1, _CHUNK_SCORES // (queries.shape[1] * max(1, head.values.shape[0])))
    for start in range(0, queries.shape[0], chunk):
        part = slice(start, start + chunk)
        own = head.bias[part, None]
        empty = own.isneginf().all(-1, keepdim=True)
        keys = head.keys.T.expand(len(own), -1, -1)
        scores = torch.baddbmm(own.masked_fill(empty, 0.0), queries[part], keys, alpha=scale)
        weights = scores.softmax(-1)
        out[part] = weights @ head.values
        if head.slopes is not None:
            out[part] += queries[part] @ head.slopes[part]
        # The row sum is the largest score less the log of its weight.
        sums[part] = (scores.amax(-1) - weights.amax(-1).log()).masked_fill(empty[..., 0], -math.inf)
    return head.layout.join(out[None, None])[0, 0], head.layout.join(sums[None, None, ..., None])[0, 0, :, 0]


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One attention out of two over disjoint keys."""
    alone = other_lse.isneginf()  # rows without a remainder, which stay as they are
    total = torch.logaddexp(lse.masked_fill(alone, 0.0), other_lse.masked_fill(alone, 0.0))
    share = (other_lse - total).exp()[..., None]
    return torch.lerp(out, other.masked_fill(alone[..., None], 0.0), share), torch.where(alone, lse, total)
