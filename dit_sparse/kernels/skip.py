"""Which of the kept blocks are skipped, by a literal loop; `AttentionPlan` has the definition.

For the reference backend, and the oracle of all others.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from dit_sparse.block_mask import BlockMask
from dit_sparse.types import AttentionPlan

__all__ = ["allowed_pairs", "log_threshold", "of_head", "without_skipped"]


def log_threshold(plan: AttentionPlan) -> float:
    """Natural logarithm of the plan's `skip_threshold`; -inf where nothing is skipped."""
    return math.log(plan.skip_threshold) if plan.skip_threshold else -math.inf


@torch.no_grad()
def without_skipped(q: Tensor, k: Tensor, plan: AttentionPlan, scale: float) -> tuple[AttentionPlan, Tensor]:
    """The plan that keeps what `plan` keeps and does not skip.

    Args:
        q, k: `[B, H, N, D]` in the plan's orders; scores are in their dtype.
        plan: with a `skip_threshold` or without.
        scale: factor of the scores.

    Returns:
        A plan without a `skip_threshold`, and `[B, H, Mq]` int64 how many query-key pairs each query block skips.
    """
    mask = plan.block_mask
    pairs = torch.zeros(*q.shape[:2], mask.num_q_blocks, dtype=torch.int64, device=q.device)
    if not plan.skip_threshold:
        return plan, pairs
    skipped = torch.zeros(*pairs.shape, mask.num_k_blocks, dtype=torch.bool, device=q.device)
    for b, h, i in itertools.product(*map(range, pairs.shape)):
        rows = _block(mask.q_offsets, b, h, i)
        peak = q.new_full((rows.stop - rows.start,), -math.inf)
        for j, partial in _in_turn(plan, b, h, i):
            columns = _block(mask.k_offsets, b, h, j)
            scores = q[b, h, rows] @ k[b, h, columns].T * scale
            if not scores.numel():
                continue
            allowed = allowed_pairs(plan, b, h, rows, columns) if partial else torch.ones_like(scores, dtype=torch.bool)
            largest = scores.masked_fill(~allowed, -math.inf).amax(-1)
            if bool((largest < peak + log_threshold(plan)).all()):
                skipped[b, h, i, j] = True
                pairs[b, h, i] += allowed.sum()
            else:
                peak = torch.maximum(peak, largest)
    rest = BlockMask.from_bool(
        mask.kept_blocks & ~skipped,
        mask.q_offsets,
        mask.k_offsets,
        partial=mask.partial_blocks,
        predicate=mask.predicate,
    )
    return AttentionPlan(plan.q_order, plan.kv_order, rest), pairs


def allowed_pairs(plan: AttentionPlan, b: int, h: int, rows: slice, columns: slice) -> Tensor:
    """`[rows, columns]` bool: what the plan's predicate lets see each other at these positions of one head."""
    predicate = plan.block_mask.predicate
    assert predicate is not None
    q_token, k_token = (
        of_head(order.index, b, h)[part] for order, part in ((plan.q_order, rows), (plan.kv_order, columns))
    )
    batch, head = (torch.tensor(number, device=q_token.device) for number in (b, h))
    return predicate(batch, head, q_token[:, None], k_token[None, :]).expand(len(q_token), len(k_token))


def _in_turn(plan: AttentionPlan, b: int, h: int, i: int) -> list[tuple[int, bool]]:
    """Key blocks of query block `i` in the order of the definition, and whether each is kept in part."""
    mask = plan.block_mask
    lists = [(mask.kv_counts, mask.kv_indices, False)]
    if mask.partial_counts is not None and mask.partial_indices is not None:
        lists.append((mask.partial_counts, mask.partial_indices, True))
    return [
        (j, partial)
        for counts, indices, partial in lists
        for j in of_head(indices, b, h)[i, : int(of_head(counts, b, h)[i])].tolist()
    ]


def _block(offsets: Tensor, b: int, h: int, i: int) -> slice:
    start, stop = of_head(offsets, b, h)[i : i + 2].tolist()
    return slice(start, stop)


def of_head(x: Tensor, b: int, h: int) -> Tensor:
    """What `x` `[B|1, H|1, ...]` says of one head."""
    return x[b % x.shape[0], h % x.shape[1]]
