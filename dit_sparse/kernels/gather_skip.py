"""How the gather backend skips blocks: the scores of all kept keys, then weights and values of those needed.

The running maximum before a block is that of the blocks before it, skipped ones or not, as a skipped one never raises
it. So which blocks are needed follows from their largest scores at once. Oracle: `skip.without_skipped`.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from dit_sparse.kernels.skip import allowed_pairs, log_threshold, of_head
from dit_sparse.types import AttentionPlan

__all__ = ["attend_skipping"]


def attend_skipping(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, out: Tensor, lse: Tensor
) -> Tensor:
    """Fill `out` and `lse`; return `[B, H, Mq]` int64 how many query-key pairs each query block skips.

    Args:
        q, k, v: `[B, H, N, D]` on the CPU, in the plan's orders.
        plan: with a `skip_threshold`.
        scale: factor of the scores.
        out: `[B, H, Nq, DV]` in the dtype of `q`.
        lse: `[B, H, Nq]` in the dtype that scores are computed in.
    """
    mask = plan.block_mask
    skipped = torch.zeros(*q.shape[:2], mask.num_q_blocks, dtype=torch.int64)
    for b, h in itertools.product(*map(range, q.shape[:2])):
        queries, keys, values = (x[b, h].to(lse.dtype) for x in (q, k, v))
        q_bounds, k_bounds = (
            of_head(offsets, b, h).numpy().astype(np.int64) for offsets in (mask.q_offsets, mask.k_offsets)
        )
        for i in range(mask.num_q_blocks):
            rows = slice(int(q_bounds[i]), int(q_bounds[i + 1]))
            whole, partial = (_filled(blocks, k_bounds) for blocks in _kept(plan, b, h, i))
            blocks = np.concatenate([whole, partial])
            if rows.start == rows.stop or not blocks.size:
                out[b, h, rows], lse[b, h, rows] = 0.0, -math.inf
                continue
            sizes = k_bounds[blocks + 1] - k_bounds[blocks]
            tokens = _tokens(k_bounds, blocks, sizes)
            # A block's scores for all rows lie together: its maximum is taken, and it is left out, at full speed.
            scores = keys[tokens] @ (queries[rows] * scale).T
            pairs = sizes * scores.shape[1]
            for n, end in enumerate(np.cumsum(sizes)[len(whole) :], len(whole)):
                columns = slice(int(k_bounds[blocks[n]]), int(k_bounds[blocks[n] + 1]))
                allowed = allowed_pairs(plan, b, h, rows, columns)
                pairs[n] = int(allowed.sum())
                scores[end - sizes[n] : end].masked_fill_(~allowed.T, -math.inf)
            largest = _largest(scores, sizes)
            needed = _needed(largest, log_threshold(plan))
            if not needed.all():
                skipped[b, h, i] = int(pairs[~needed].sum())
                scores = _of_blocks(scores, sizes, needed)
                tokens = _tokens(k_bounds, blocks[needed], sizes[needed])
            peaks = largest.amax(0)
            empty = peaks.isneginf()
            weights = scores.sub_(peaks.masked_fill_(empty, 0.0)).exp_()
            sums = weights.sum(0)
            out[b, h, rows] = (weights.T @ values[tokens]) / sums.masked_fill(empty, 1.0)[:, None]
            lse[b, h, rows] = peaks + sums.log()
    return skipped


def _largest(scores: Tensor, sizes: np.ndarray) -> Tensor:
    """`[blocks, rows]` largest score of each block of `sizes` keys that `scores` `[keys, rows]` hold."""
    if (sizes == sizes[0]).all():
        return scores.unflatten(0, (len(sizes), -1)).amax(1)
    return torch.from_numpy(np.maximum.reduceat(scores.numpy(), np.cumsum(sizes) - sizes, axis=0))


def _needed(largest: Tensor, threshold: float) -> np.ndarray:
    """`[blocks]` bool: which are not skipped."""
    before = torch.full_like(largest, -math.inf)
    before[1:] = largest.cummax(0).values[:-1]
    needed: np.ndarray = (~(largest < before + threshold)).any(1).numpy()
    return needed


def _of_blocks(scores: Tensor, sizes: np.ndarray, chosen: np.ndarray) -> Tensor:
    """The rows of the `chosen` blocks of `scores` `[keys, rows]`."""
    if (sizes == sizes[0]).all():
        return (
            scores.unflatten(0, (len(sizes), -1)).index_select(0, torch.from_numpy(chosen.nonzero()[0])).flatten(0, 1)
        )
    return scores[torch.from_numpy(np.repeat(chosen, sizes))]


def _kept(plan: AttentionPlan, b: int, h: int, i: int) -> tuple[np.ndarray, np.ndarray]:
    """Key blocks that a query block keeps whole and in part."""
    mask = plan.block_mask
    whole = of_head(mask.kv_indices, b, h)[i, : int(of_head(mask.kv_counts, b, h)[i])].numpy()
    if mask.partial_counts is None or mask.partial_indices is None:
        return whole, whole[:0]
    return whole, of_head(mask.partial_indices, b, h)[i, : int(of_head(mask.partial_counts, b, h)[i])].numpy()


def _filled(blocks: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Those of `blocks` that have tokens."""
    filled: np.ndarray = blocks[bounds[blocks + 1] > bounds[blocks]]
    return filled


def _tokens(bounds: np.ndarray, blocks: np.ndarray, sizes: np.ndarray) -> Tensor | slice:
    """Positions of the tokens of `blocks` in turn, a slice where they are one run."""
    starts = bounds[blocks]
    if (starts[1:] == starts[:-1] + sizes[:-1]).all():
        return slice(int(starts[0]), int(starts[-1] + sizes[-1]))
    return torch.from_numpy(np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes))
