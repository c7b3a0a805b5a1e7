"""Ranks agree on what they are about to do, before they exchange anything that must fit; and nobody waits for ever."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dit_sparse.lost_ranks import told_of_losses

__all__ = ["Agreement"]


class Agreement:
    """Compares facts over the ranks of a group.

    It has a gloo group of its own, so that a comparison never gets between the exchanges of another backend.

    Args:
        ranks: global numbers of the ranks, in the group's order.
        timeout: seconds after which a rank that does not answer counts as lost.

    Raises:
        RankLostError: a rank does not join in time.
    """

    def __init__(self, ranks: Sequence[int], timeout: float) -> None:
        self.ranks = tuple(ranks)
        wait = timedelta(seconds=timeout)
        with told_of_losses("joining the ranks"):
            self._group = dist.new_group(list(ranks), timeout=wait, backend="gloo", use_local_synchronization=True)

    def check(self, doing: str, facts: Mapping[str, Any]) -> None:
        """Raise on every rank unless all have equal `facts`.

        Args:
            doing: what is about to be done, for messages.
            facts: JSON values by name.

        Raises:
            ValueError: facts that differ, by name, with what each rank has.
            RankLostError: a rank does not answer.
        """
        text = json.dumps(facts, sort_keys=True, default=str)
        digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
        digests = [torch.empty_like(digest) for _ in self.ranks]
        with told_of_losses(doing):
            dist.all_gather(digests, digest, group=self._group)
            if all(torch.equal(digest, other) for other in digests):
                return
        told = self.gather(doing, dict(facts))
        names = sorted({name for other in told for name in other if other[name] != told[0].get(name)})
        names = names or sorted(told[0])
        differ = "; ".join(
            f"{name}: "
            + ", ".join(f"rank {rank} {other.get(name)!r:.200}" for rank, other in zip(self.ranks, told, strict=True))
            for name in names
        )
        raise ValueError(f"all ranks must agree when {doing}, got {differ}")

    def gather(self, doing: str, value: Any) -> list[Any]:
        """Every rank's `value`, in the group's order; it must pickle."""
        values: list[Any] = [None for _ in self.ranks]
        with told_of_losses(doing):
            dist.all_gather_object(values, value, group=self._group)
        return values
