"""A plan of all heads, put together from the ranks that made it."""

from __future__ import annotations

from torch import Tensor

from dit_sparse.block_mask import BlockMask, pack_bits, unpack_bits
from dit_sparse.head_shard import HeadShard
from dit_sparse.parallel.agree import Agreement
from dit_sparse.types import AttentionPlan, TokenOrder

__all__ = ["gather_plan"]


def gather_plan(plan: AttentionPlan, shard: HeadShard, agreement: Agreement) -> AttentionPlan:
    """The plan of all heads, of which each rank has that of its own.

    Raises:
        ValueError: plans that do not fit each other, or partial blocks, whose predicate cannot be sent.
    """
    mask, own = plan.block_mask, len(shard.heads)
    if mask.partial_counts is not None:
        raise ValueError("plan must have whole blocks to be sent to other ranks, got a token predicate; use ulysses alone")
    per_head = own == 1 or any(order.index.shape[1] > 1 for order in (plan.q_order, plan.kv_order))
    facts = {
        "blocks": [mask.num_q_blocks, mask.num_k_blocks],
        "batch": [x.shape[0] for x in (mask.kv_counts, plan.q_order.index, plan.kv_order.index)],
        "one order": plan.kv_order is plan.q_order,
        "remainder": plan.remainder,
    }
    agreement.check("putting their plans together", facts)
    # With one head a plan does not tell whether its order is for all of them.
    told = agreement.gather("putting their plans together", (own, per_head))
    by_head = any(per_head for own, per_head in told if own > 1) or all(own == 1 for own, _ in told)
    q_order = _gather_order(plan.q_order, shard) if by_head else plan.q_order
    kv_order = q_order if plan.kv_order is plan.q_order else plan.kv_order
    if by_head and kv_order is plan.kv_order:
        kv_order = _gather_order(plan.kv_order, shard)
    bits = shard.gather(_expanded(pack_bits(mask.full_blocks), own))
    kept = unpack_bits(bits, mask.num_k_blocks)
    return AttentionPlan(q_order, kv_order, BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets), plan.remainder)


def _gather_order(order: TokenOrder, shard: HeadShard) -> TokenOrder:
    own = len(shard.heads)
    index, inverse = (shard.gather(_expanded(x, own)) for x in (order.index, order.inverse))
    return TokenOrder(index, inverse, shard.gather(_expanded(order.offsets, own)))


def _expanded(x: Tensor, heads: int) -> Tensor:
    return x.expand(-1, heads, *x.shape[2:])
