"""A plan's remainder is tried on a few queries before it is used; heads that it would harm get a lower one."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dit_sparse.attention import check_fit, sparse_attention
from dit_sparse.kernels import dense_attention, permute, scattered_places
from dit_sparse.types import REMAINDERS, AttentionPlan, BlockGeometry, BlockMask, Remainder, TokenOrder

__all__ = ["safe_remainder"]

LARGEST_ERROR = 0.95
"""Squared, over that of "none", on the queries tried."""

DEVIATIONS = 2.0
"""Standard errors by which it must be below that, as the queries are a sample."""

_BLOCKS = 32
_ROWS = 8


@torch.no_grad()
def safe_remainder(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, *, scale: float | None = None, in_order: bool = False
) -> AttentionPlan:
    """`plan` with each head's `head_remainders` as high as does it good.

    Eight queries of each of up to 32 query blocks attend under the plan with every remainder up to the plan's own, as
    if they were their whole block, and densely. Let `g_I` be `LARGEST_ERROR` times the squared error of "none" less
    that of a remainder, on the queries of block I and times its size. A head gets the highest remainder with

        sum of g_I >= DEVIATIONS * sqrt(sum of (g_I - mean of g)^2),

    the right side being the standard errors of the left one, and "none" if there is no such. The batch counts as one
    where the plan tells no batches apart.

    That is dense attention of 256 queries at most, less under the plan, and the moments of the key blocks.

    Args:
        q, k, v, scale, in_order: as in `sparse_attention`; q, k, v of the kind that the plan is made for.
        plan: returned as it is where it keeps everything or has no remainder.

    Returns:
        The plan with `head_remainders`, `[B|1, H]` int8; nothing waits for a GPU.

    Raises:
        ValueError: tensors or a plan that do not fit each other.

    Source: ours.
    """
    check_fit(q, k, v, plan)
    if plan.remainder == "none" or plan.is_dense:
        return plan
    taken = _sample(plan)
    tokens = taken.positions if in_order else taken.tokens
    queries = q.gather(2, tokens.expand(*q.shape[:2], -1)[..., None].expand(-1, -1, -1, q.shape[-1]))
    if not in_order:
        k, v = permute(plan.kv_order, k, v)
    dense = dense_attention(queries, k, v, scale=scale)
    compute = torch.promote_types(q.dtype, torch.float32)

    def errors(remainder: Remainder) -> Tensor:
        own = taken.plan.with_remainder(remainder)
        apart = sparse_attention(queries, k, v, own, scale=scale, in_order=True).to(compute) - dense.to(compute)
        found = (apart.square().sum(-1) * taken.weights).unflatten(-1, (taken.plan.q_order.num_blocks, -1)).sum(-1)
        return found if plan.num_batches > 1 else found.sum(0, keepdim=True)

    without = errors("none")
    levels = torch.zeros(without.shape[:2], dtype=torch.int8, device=q.device)
    for level in range(REMAINDERS.index(plan.remainder), 0, -1):
        gains = LARGEST_ERROR * without - errors(REMAINDERS[level])
        noise = (gains - gains.mean(-1, keepdim=True)).norm(dim=-1)
        levels.masked_fill_((levels == 0) & (gains.sum(-1) >= DEVIATIONS * noise), level)
        if levels.device.type == "cpu" and bool(levels.all()):  # a GPU would have to be waited for
            break
    return replace(plan, head_remainders=levels)


class _Sample(NamedTuple):
    """Some queries of a plan.

    Args:
        positions, tokens: `[B|1, H|1, R]` int64 where they are in the plan's order of queries and in the sequence.
        weights: `[B|1, H|1, R]` for how many tokens each stands, up to a factor.
        plan: what they attend to; they lie one behind the other, a query block of `_ROWS` for each of the plan's.
    """

    positions: Tensor
    tokens: Tensor
    weights: Tensor
    plan: AttentionPlan


def _sample(plan: AttentionPlan) -> _Sample:
    mask, offsets = plan.block_mask, plan.q_order.offsets
    count, rows = min(_BLOCKS, mask.num_q_blocks), min(_ROWS, plan.q_order.geometry.largest)
    blocks = scattered_places(torch.full((), mask.num_q_blocks, device=offsets.device), count)
    sizes = offsets.diff(dim=-1)[..., blocks]
    # An empty block has no query; what is read in its place has no weight.
    positions = (offsets[..., blocks, None].long() + scattered_places(sizes, rows)).clamp(
        max=plan.q_order.num_tokens - 1
    )
    positions, weights = positions.flatten(2), sizes.repeat_interleave(rows, -1)
    bounds = torch.arange(0, count * rows + 1, rows, device=offsets.device)
    order = TokenOrder.from_index(torch.arange(count * rows, device=offsets.device), bounds, is_identity=True)
    order.__dict__["geometry"] = BlockGeometry(rows, 0, count)  # reading it back would wait for the device
    index = plan.q_order.index
    lead = [max(a, b) for a, b in zip(index.shape[:2], positions.shape[:2], strict=True)]
    tokens = index.expand(*lead, -1).gather(-1, positions.expand(*lead, -1))
    partial, predicate, own = mask.partial_blocks, mask.predicate, None
    if partial is not None and predicate is not None:
        partial = partial[..., blocks, :]
        own = lambda b, h, i, j: predicate(b, h, tokens[b % lead[0], h % lead[1], i], j)  # noqa: E731
    kept = mask.kept_blocks[..., blocks, :]
    taken = BlockMask.from_bool(kept, order.offsets, mask.k_offsets, partial=partial, predicate=own)
    return _Sample(positions, tokens, weights, AttentionPlan(order, plan.kv_order, taken))
