"""Ring attention under a plan: queries stay, keys and values go round, parts are merged by their row sums.

Source: Ring Attention with Blockwise Transformers (arXiv 2310.01889). A plan is cut at the ranks' bounds: its blocks
become smaller ones that hold the tokens of one rank, so what is computed is what the plan says, to the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dit_sparse.block_mask import TokenPredicate
from dit_sparse.lost_ranks import told_of_losses
from dit_sparse.types import AttentionPlan, Remainder, TokenOrder

__all__ = ["Chunk", "check_remainder", "cut_plan", "merge", "ring_attention"]

Runs = Sequence[tuple[int, int]]
Part = tuple[Tensor, Tensor]
"""Output `[B, H, n, D]` and natural-log row sums `[B, H, n]` float32."""


class Chunk:
    """The tokens that one rank of a ring holds.

    Args:
        runs: runs `(start, end)` of the sequence, in the order in which the rank holds them.
        tokens: length of the sequence; runs are cut there.
    """

    def __init__(self, runs: Runs, tokens: int) -> None:
        self.runs = tuple((min(start, tokens), min(end, tokens)) for start, end in runs)
        self.size = sum(end - start for start, end in self.runs)

    def numbers(self, device: torch.device) -> Tensor:
        """`[size]` int64 numbers of the tokens in the sequence."""
        return torch.cat([torch.arange(start, end, device=device) for start, end in self.runs])


def ring_attention(
    k: Tensor, v: Tensor, chunks: Sequence[Chunk], group: Any, attend: Callable[[int, Tensor, Tensor], Part]
) -> Part:
    """Attention of this rank's queries to the keys of all ranks; the next part travels while one is computed.

    Args:
        k, v: `[B, H, n, D]` of this rank.
        chunks: what each rank of the ring holds.
        group: the ring.
        attend: output and row sums of this rank's queries over the keys and values of one rank.
    """
    rank, ranks = dist.get_rank(group), len(chunks)
    there, back = (dist.get_global_rank(group, (rank + step) % ranks) for step in (1, -1))
    held = torch.stack([k, v])
    result: Part | None = None
    for turn in range(ranks):
        source, following = (rank - turn) % ranks, (rank - turn - 1) % ranks
        waiting: list[Any] = []
        arriving = held
        if turn + 1 < ranks:
            arriving = held.new_empty(*held.shape[:3], chunks[following].size, held.shape[-1])
            ops = [dist.P2POp(dist.isend, held, there, group), dist.P2POp(dist.irecv, arriving, back, group)]
            with told_of_losses("passing keys and values on"):
                waiting = dist.batch_isend_irecv(ops)
        part = attend(source, held[0], held[1])
        result = part if result is None else merge(result, part)
        with told_of_losses("passing keys and values on"):
            for work in waiting:
                work.wait()
        held = arriving
    assert result is not None
    return result


def merge(a: Part, b: Part) -> Part:
    """Attention over the keys of `a` and `b` together; outputs in float32, a row without any key gives zeros."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = torch.logaddexp(lse_a, lse_b)
    weight_a, weight_b = ((own - lse).exp().nan_to_num(0.0)[..., None] for own in (lse_a, lse_b))
    return out_a.to(lse.dtype) * weight_a + out_b.to(lse.dtype) * weight_b, lse


def check_remainder(remainder: Remainder) -> None:
    """Whether plans with `remainder` can be cut at the ranks' bounds.

    Raises:
        ValueError: one that is not "none".
    """
    if remainder != "none":
        raise ValueError(f"remainder must be 'none' in a ring, got {remainder!r}: it is of whole blocks; use ulysses")


def cut_plan(plan: AttentionPlan, chunks: Sequence[Chunk], rank: int) -> list[AttentionPlan]:
    """For each chunk of keys the plan of the queries of chunk `rank`; made once a plan.

    Raises:
        ValueError: a plan with a remainder or one that skips blocks, which are of whole blocks.
    """
    check_remainder(plan.remainder)
    if plan.skip_threshold:
        raise ValueError(
            f"skip_threshold must be 0 in a ring, got {plan.skip_threshold:g}: whole blocks are skipped, and each rank "
            "sees parts of them; use ulysses"
        )
    if "ring" not in plan.derived:
        device = plan.q_order.index.device
        q_order = _cut(plan.q_order, chunks)[rank]
        numbers = [chunk.numbers(device) for chunk in chunks]
        plan.derived["ring"] = [
            _between(plan, q_order, kv_order, numbers[rank], own)
            for kv_order, own in zip(_cut(plan.kv_order, chunks), numbers, strict=True)
        ]
    return plan.derived["ring"]


def _between(plan: AttentionPlan, q_order: TokenOrder, kv_order: TokenOrder, q: Tensor, k: Tensor) -> AttentionPlan:
    predicate = plan.block_mask.predicate
    mask = replace(
        plan.block_mask,
        q_offsets=q_order.offsets,
        k_offsets=kv_order.offsets,
        predicate=None if predicate is None else _Renumbered(predicate, q, k),
        kept_pairs=None,
    )
    return AttentionPlan(q_order, kv_order, mask)


class _Renumbered:
    """A token predicate for tokens that are numbered from 0 in each chunk."""

    def __init__(self, predicate: TokenPredicate, q: Tensor, k: Tensor) -> None:
        self.predicate, self.q, self.k = predicate, q, k
        self.uniform = getattr(predicate, "uniform", False)

    def __call__(self, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.predicate(b, h, self.q[i], self.k[j])


# Cut orders by what lasts of the order they come from: a plan at rest is made anew at every use.
_cut_orders: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _cut(order: TokenOrder, chunks: Sequence[Chunk]) -> list[TokenOrder]:
    """`order` cut into the tokens of each chunk, numbered from 0, in the same blocks, some of them empty."""
    key = tuple(chunk.runs for chunk in chunks)
    known = _cut_orders.setdefault(order.lasting, {})
    if key not in known:
        known[key] = [_cut_one(order, chunk) for chunk in chunks]
    return known[key]


def _cut_one(order: TokenOrder, chunk: Chunk) -> TokenOrder:
    index = order.index
    local = torch.full((order.num_tokens,), -1, dtype=torch.int64, device=index.device)
    local[chunk.numbers(index.device)] = torch.arange(chunk.size, device=index.device)
    numbers = local[index]
    inside = numbers >= 0
    before = torch.nn.functional.pad(inside.cumsum(-1), (1, 0))
    places = torch.where(inside, before[..., 1:] - 1, chunk.size)
    # Tokens of other chunks go to a spare place.
    cut = index.new_empty(*index.shape[:2], chunk.size + 1).scatter_(-1, places, numbers)[..., : chunk.size]
    leading = [max(a, b) for a, b in zip(index.shape[:2], order.offsets.shape[:2], strict=True)]
    offsets = before.expand(*leading, -1).gather(-1, order.offsets.long().expand(*leading, -1))
    return TokenOrder.from_index(cut, offsets, is_identity=order.is_identity)
