"""Sparse attention where a sequence lies on several ranks: Ulysses, a ring, or both."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_sparse.attention import attend, sparse_attention
from dit_sparse.head_shard import HeadShard
from dit_sparse.kernels import dense_attention, select
from dit_sparse.parallel.agree import Agreement
from dit_sparse.parallel.balance import Assignment, balanced, contiguous, imbalance
from dit_sparse.parallel.exchange import Places, to_heads, to_tokens
from dit_sparse.parallel.plans import gather_plan
from dit_sparse.parallel.ring import Chunk, Part, cut_plan, ring_attention
from dit_sparse.parallel.split import SequenceSplit
from dit_sparse.types import AttentionPlan, Method, PackedPlan, Previous, Site, TokenGrid, TokenOrder

__all__ = ["ContextParallel", "Mesh"]

Key = tuple[Any, ...]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_WORTH_MOVING = 0.05
"""Share of a rank's attention that a better spread of the heads must save before plans are moved."""


@dataclass(frozen=True)
class Mesh:
    """The ranks that share a sequence, ring by ring: rank `r * ulysses + u` of the group is at `(r, u)`.

    Args:
        group: all of them, of torch.distributed.
        ulysses_group, ring_group: those that share this rank's tokens, and those that share its heads.
        timeout: seconds after which a rank that does not answer counts as lost.
    """

    group: Any
    ulysses_group: Any
    ring_group: Any
    timeout: float

    @property
    def ulysses(self) -> int:
        return dist.get_world_size(self.ulysses_group)

    @property
    def ring(self) -> int:
        return dist.get_world_size(self.ring_group)

    @property
    def rank(self) -> int:
        """This process in the group."""
        return dist.get_rank(self.group)

    @functools.cached_property
    def agreement(self) -> Agreement:
        """Of all ranks; joined once."""
        return Agreement(dist.get_process_group_ranks(self.group), self.timeout)

    @functools.cached_property
    def ulysses_agreement(self) -> Agreement:
        return Agreement(dist.get_process_group_ranks(self.ulysses_group), self.timeout)

    @functools.cached_property
    def ring_agreement(self) -> Agreement:
        return Agreement(dist.get_process_group_ranks(self.ring_group), self.timeout)


class ContextParallel:
    """Runs the attention of the parts of a sequence that lie on the ranks of `mesh`.

    Heads are exchanged for tokens within a Ulysses group, so that a method plans for this rank's heads alone, and keys
    and values go round in a ring. What a method costs by head is gathered after each plan; from the next call at the
    same place on, heads are spread anew where that pays, and plans and row sums move with them.

    Args:
        mesh: the ranks.
        balance: whether heads of unequal density are spread anew.
    """

    def __init__(self, mesh: Mesh, balance: bool = True) -> None:
        self.mesh = mesh
        self.balance = balance
        self.moves = 0
        self._ulysses_rank, self._ring_rank = dist.get_rank(mesh.ulysses_group), dist.get_rank(mesh.ring_group)
        self._split: SequenceSplit | None = None
        self._order: TokenOrder | None = None
        self._placed: Places | None = None
        self._shard: HeadShard | None = None
        self._unit: Key = ()
        self._assignments: dict[Key, Assignment] = {}
        self._costs: dict[Key, list[Tensor]] = {}
        self._densities: dict[Key, Tensor] = {}

    def begin_run(self) -> None:
        """Forget what an earlier run found out."""
        for known in (self._assignments, self._costs, self._densities):
            known.clear()

    def begin_forward(self, grid: TokenGrid, facts: Mapping[str, Any], order: TokenOrder | None = None) -> None:
        """Before each forward: make sure that all ranks are about to do the same.

        Args:
            grid: layout of its sequences, padding counted as text.
            facts: what must be equal on all ranks, JSON values by name.
            order: where there is no ring, the order that tokens are brought into when heads are exchanged.

        Raises:
            ValueError: facts that differ, or fewer tokens than ranks.
            RankLostError: a rank does not answer.
        """
        self.mesh.agreement.check("beginning a forward", facts)
        if self._split is None or self._split.grid != grid or self._order is not order:
            self._split, self._order = SequenceSplit(grid, self.mesh.ulysses * self.mesh.ring), order
            self._placed = None

    def attend(
        self, unit: Key, plans: MutableMapping[Key, Previous], q: Tensor, k: Tensor, v: Tensor, run: Attend
    ) -> Tensor:
        """One self-attention call.

        Args:
            unit: what shares one spread of the heads with this call: model, layer and branch as far as the keys of
                plans have them behind the grid, and nothing where a plan is of the grid alone.
            plans: what is kept from earlier calls; those of `unit` are moved if heads are.
            q, k, v: `[B, H, n, D]`: this rank's tokens with all heads.
            run: attention of this rank's heads, on all tokens, or in a ring on those of its ring's part.

        Returns:
            `[B, H, n, D]`.
        """
        self._unit, self._shard = unit, self._spread(unit, plans, q.shape[1])
        if self.mesh.ulysses == 1:
            return run(q, k, v)
        places = self._places(q.device)
        return to_tokens(run(*to_heads([q, k, v], self._shard, places)), self._shard, places)

    def _places(self, device: torch.device) -> Places:
        """Where the tokens of this Ulysses group go; one behind the other in a ring, whose part they are."""
        if self._placed is None:
            split, mesh = self._split_now(), self.mesh
            first = self._ring_rank * mesh.ulysses
            part = split.runs(first, mesh.ulysses)
            runs = [_within(split.runs(first + rank), part) for rank in range(mesh.ulysses)]
            self._placed = Places.of(runs, device, self._order)
        return self._placed

    def _split_now(self) -> SequenceSplit:
        if self._split is None:
            raise ValueError("attention must run inside a forward under context parallelism, got a call outside of one")
        return self._split

    # What a session does with the heads that it is given.

    def num_tokens(self, grid: TokenGrid) -> int:
        """Of `grid`'s tokens those that a call gets here, which come first."""
        return grid.num_tokens if self.mesh.ring == 1 else self._chunks(grid.num_tokens)[self._ring_rank].size

    def site(self, site: Site) -> Site:
        """`site` with the heads that a plan is made for."""
        return replace(site, heads=self._shard)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Part:
        """Dense attention over a sequence of `tokens`, and its row sums."""
        if self.mesh.ring == 1:
            return dense_attention(q, k, v, return_lse=True)
        chunks = self._chunks(tokens)
        out, lse = ring_attention(
            k, v, chunks, self.mesh.ring_group, lambda _, k, v: dense_attention(q, k, v, return_lse=True)
        )
        return out.to(q.dtype), lse

    def plan(
        self, key: Key, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None
    ) -> AttentionPlan:
        """The plan of this rank's heads, or of all heads where the grid alone decides it."""
        shard = self._shard
        assert shard is not None
        if method.scope == "grid":
            stand_in = q[:, :1, :1].expand(q.shape[0], shard.total, site.grid.num_tokens, -1)
            plan = method.plan(stand_in, stand_in, stand_in, replace(site, heads=None), None)
            density = plan.density
        else:
            plan = (
                method.plan(q, k, v, site, previous)
                if self.mesh.ring == 1
                else self._plan_in_ring(method, q, k, v, site, previous)
            )
            density = shard.gather(plan.density.expand(-1, len(shard.heads)))
        self._densities[key] = density
        if density.shape[1] == shard.total:
            self._costs.setdefault(self._unit, []).append(density)
        return plan

    def density(self, key: Key, plan: AttentionPlan) -> Tensor:
        """`[B|1, H|1]` density of `plan` on all heads of the model."""
        known = self._densities.get(key)
        return plan.density if known is None else known

    def sparse(
        self, backend: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, in_order: bool = False
    ) -> tuple[Tensor, str, Tensor | None]:
        """Attention under `plan`, the backend that computed it, and `[B, H]` pairs that all heads have skipped."""
        shard = self._shard
        assert shard is not None
        # A plan of the grid is of all heads.
        if plan.num_heads == shard.total:
            plan = plan.of_heads(shard.heads)
        if self.mesh.ring == 1:
            out, name, skipped = attend(backend, q, k, v, plan, in_order)
            return out, name, None if skipped is None else shard.gather(skipped)
        if plan.is_dense:
            return self.dense(q, k, v, plan.q_order.num_tokens)[0], "dense", None
        chunks = self._chunks(plan.q_order.num_tokens)
        plans = cut_plan(plan, chunks, self._ring_rank)
        name = select(backend, q, k, v, plans[self._ring_rank]).name

        def part(source: int, k: Tensor, v: Tensor) -> Part:
            return sparse_attention(q, k, v, plans[source], backend=name, return_lse=True)

        return ring_attention(k, v, chunks, self.mesh.ring_group, part)[0].to(q.dtype), name, None

    def _plan_in_ring(
        self, method: Method, q: Tensor, k: Tensor, v: Tensor, site: Site, previous: Previous | None
    ) -> AttentionPlan:
        """Each rank of the ring plans for a part of the heads that they share, and the plans are put together."""
        shard, mesh = self._shard, self.mesh
        assert shard is not None
        own = HeadShard(contiguous(q.shape[1], mesh.ring), self._ring_rank, mesh.ring_group)
        places = Places.of([chunk.runs for chunk in self._chunks(site.grid.num_tokens)], q.device)
        q, k, v = to_heads([q, k, v], own, places)
        if previous is not None:
            plan = None if previous.plan is None else previous.plan.unpack().of_heads(own.heads)
            lse = None if previous.lse is None else to_heads([previous.lse[..., None]], own, places)[0][..., 0]
            previous = replace(previous, plan=plan, lse=lse)
        parts = [
            tuple(heads[i] for i in contiguous(len(heads), mesh.ring)[r])
            for r in range(mesh.ring)
            for heads in shard.assignment
        ]
        every = HeadShard(tuple(parts), mesh.rank, mesh.group)
        return gather_plan(method.plan(q, k, v, replace(site, heads=every), previous), own, mesh.ring_agreement)

    def _chunks(self, tokens: int) -> list[Chunk]:
        split, u = self._split_now(), self.mesh.ulysses
        return [Chunk(split.runs(r * u, u), tokens) for r in range(self.mesh.ring)]

    # Which heads are where.

    def _spread(self, unit: Key, plans: MutableMapping[Key, Previous], heads: int) -> HeadShard:
        """The heads of this call, spread anew if what the last plans cost says so."""
        ranks = self.mesh.ulysses
        current = self._assignments.setdefault(unit, contiguous(heads, ranks))
        shard = HeadShard(current, self._ulysses_rank, self.mesh.ulysses_group)
        costs = self._costs.pop(unit, None)
        if costs is None or ranks == 1 or not self.balance:
            return shard
        by_head = torch.stack([cost.mean(0) for cost in costs]).mean(0).tolist()
        better = balanced(by_head, ranks)
        if imbalance(by_head, current) - imbalance(by_head, better) < _WORTH_MOVING:
            return shard
        moved = HeadShard(better, self._ulysses_rank, self.mesh.ulysses_group)
        for key, previous in plans.items():
            if unit and key[1 : 1 + len(unit)] == unit:
                plans[key] = self._moved(previous, shard, moved)
        self._assignments[unit] = better
        self.moves += 1
        return moved

    def _moved(self, previous: Previous, old: HeadShard, new: HeadShard) -> Previous:
        """What is kept of this rank's old heads, exchanged for what is kept of its new ones."""
        plan: AttentionPlan | PackedPlan | None = previous.plan
        if plan is not None:
            whole = gather_plan(plan.unpack(), old, self.mesh.ulysses_agreement)
            own = whole.of_heads(new.heads)
            plan = own.pack() if isinstance(plan, PackedPlan) else own
        lse = None if previous.lse is None else new.own(old.gather(previous.lse)).contiguous()
        return replace(previous, plan=plan, lse=lse)


def _within(runs: list[tuple[int, int]], chunk: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """`runs` of the sequence as places in `chunk`, which holds several runs of it one behind the other."""
    placed, at = [], 0
    starts = []
    for start, end in chunk:
        starts.append((start, end, at))
        at += end - start
    for start, end in runs:
        for a, b, place in starts:
            if a <= start and end <= b:
                placed.append((start - a + place, end - a + place))
    return placed
