"""A plan of all heads, put together from the ranks that made it."""

from __future__ import annotations

import hashlib

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
        raise ValueError(
            "plan must have whole blocks to be sent to other ranks, got a token predicate; use ulysses alone"
        )
    facts = {
        "blocks": [mask.num_q_blocks, mask.num_k_blocks],
        "batch": [x.shape[0] for x in (mask.kv_counts, plan.q_order.index, plan.kv_order.index)],
        "one order": plan.kv_order is plan.q_order,
        "remainder": plan.remainder,
        "skip threshold": plan.skip_threshold,
        "remainders by head": plan.head_remainders is not None,
    }
    agreement.check("putting their plans together", facts)
    q_order, kv_order = plan.q_order, plan.kv_order
    if _is_by_head(plan, own, agreement):
        q_order = _gather_order(plan.q_order, shard)
        kv_order = q_order if plan.kv_order is plan.q_order else _gather_order(plan.kv_order, shard)
    bits = shard.gather(_expanded(pack_bits(mask.full_blocks), own))
    kept = unpack_bits(bits, mask.num_k_blocks)
    whole = BlockMask.from_bool(kept, q_order.offsets, kv_order.offsets)
    remainders = plan.head_remainders
    if remainders is not None:
        remainders = shard.gather(_expanded(remainders, own))
    return AttentionPlan(q_order, kv_order, whole, plan.remainder, plan.skip_threshold, remainders)


def _is_by_head(plan: AttentionPlan, own: int, agreement: Agreement) -> bool:
    """Whether heads have orders of their own, on any rank. A plan of one head does not tell, so those are compared."""
    orders = (plan.q_order.index, plan.kv_order.index)
    by_head = own > 1 and any(index.shape[1] > 1 for index in orders)
    digest = "" if own > 1 else "".join(hashlib.sha256(index.cpu().numpy().tobytes()).hexdigest() for index in orders)
    told = agreement.gather("putting their plans together", (by_head, digest))
    return any(by_head for by_head, _ in told) or len({digest for _, digest in told if digest}) > 1


def _gather_order(order: TokenOrder, shard: HeadShard) -> TokenOrder:
    own = len(shard.heads)
    index, inverse = (shard.gather(_expanded(x, own)) for x in (order.index, order.inverse))
    return TokenOrder(index, inverse, shard.gather(_expanded(order.offsets, own)))


def _expanded(x: Tensor, heads: int) -> Tensor:
    return x.expand(-1, heads, *x.shape[2:])
