"""The heads that one rank of a sequence-parallel group attends with, and how methods that mix heads see the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from dit_sparse.lost_ranks import told_of_losses

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["HeadShard", "select_heads"]


@dataclass(frozen=True, eq=False)
class HeadShard:
    """Which heads of a model each rank of a group has.

    Args:
        assignment: for each rank of the group the numbers of its heads; together every head once.
        rank: this process in the group.
        group: of torch.distributed.

    Raises:
        ValueError: a head that no rank or more than one has, or a rank without heads.
    """

    assignment: tuple[tuple[int, ...], ...]
    rank: int
    group: ProcessGroup | None

    def __post_init__(self) -> None:
        everything = sorted(head for heads in self.assignment for head in heads)
        if everything != list(range(len(everything))) or not all(self.assignment):
            raise ValueError(
                f"assignment must give every head to one rank and every rank a head, got {self.assignment}"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Numbers of this rank's heads, in the order in which its tensors hold them."""
        return self.assignment[self.rank]

    @cached_property
    def total(self) -> int:
        """Heads of the model."""
        return sum(map(len, self.assignment))

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The heads as they stand when the ranks' tensors are put one behind the other."""
        return tuple(head for heads in self.assignment for head in heads)

    @cached_property
    def inverse(self) -> tuple[int, ...]:
        """Where in `order` each head stands."""
        return tuple(self.order.index(head) for head in range(self.total))

    def own(self, x: Tensor) -> Tensor:
        """This rank's heads of `x` `[B, total, ...]`."""
        return select_heads(x, self.heads)

    def gather(self, x: Tensor) -> Tensor:
        """`[B, total, ...]`: every rank's `x` `[B, own heads, ...]`, in the heads' own order."""
        most = max(map(len, self.assignment))
        padded = x.new_zeros(most, x.shape[0], *x.shape[2:])
        padded[: x.shape[1]] = x.transpose(0, 1)
        parts = x.new_empty(len(self.assignment), *padded.shape)
        with told_of_losses("gathering what ranks know of their heads"):
            dist.all_gather(list(parts), padded, group=self.group)
        places = {head: r * most + i for r, heads in enumerate(self.assignment) for i, head in enumerate(heads)}
        return select_heads(parts.flatten(0, 1).transpose(0, 1), tuple(places[head] for head in range(self.total)))

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`."""
        total = x.clone()
        with told_of_losses("adding up what ranks know of their heads"):
            dist.all_reduce(total, group=self.group)
        return total


def select_heads(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """The `heads` of `x` `[B, H|1, ...]`: `x` itself where it has one for all, a view where they are neighbours."""
    if x.shape[1] == 1:
        return x
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x[:, heads[0] : heads[0] + len(heads)]
    return x[:, list(heads)]
