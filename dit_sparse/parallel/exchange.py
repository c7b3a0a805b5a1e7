"""The all-to-all of Ulysses: from a part of the tokens with all heads to all tokens with a part of the heads, and back.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1. Heads go to ranks by any assignment and need not divide by
them, and neither need tokens. What is sent lies token by token, so that tokens which arrive in the order that is wanted
are not copied, and others are moved once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dit_sparse.head_shard import HeadShard
from dit_sparse.lost_ranks import told_of_losses
from dit_sparse.types import TokenOrder

__all__ = ["Places", "to_heads", "to_tokens"]


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of several ranks go when they come together.

    Args:
        sizes: tokens that each rank holds.
        index: `[N]` int64: for each place the token there, counted through the ranks; `None` if they fall into place.
        inverse: `[N]` int64, the way back.
    """

    sizes: tuple[int, ...]
    index: Tensor | None = None
    inverse: Tensor | None = None

    @classmethod
    def of(
        cls, runs: Sequence[Sequence[tuple[int, int]]], device: torch.device, order: TokenOrder | None = None
    ) -> Places:
        """Places in the sequence's own order, or in `order`, which all heads share.

        Args:
            runs: for each rank the runs `(start, end)` of the sequence that it holds, in the order it holds them.
            device: of the tokens.
            order: another order to bring them into.
        """
        sizes = tuple(sum(end - start for start, end in own) for own in runs)
        flat = [run for own in runs for run in own if run[0] < run[1]]
        if order is None and all(before[1] == after[0] for before, after in itertools.pairwise(flat)):
            return cls(sizes)
        numbers = torch.cat([torch.arange(start, end, device=device) for start, end in flat])
        index = torch.empty_like(numbers)
        index[numbers] = torch.arange(len(numbers), device=device)
        if order is None:
            return cls(sizes, index, numbers)
        # An order leaves padding out, which stays behind everything else.
        padding = torch.arange(order.num_tokens, len(numbers), device=device)
        return cls(
            sizes,
            index[torch.cat([order.index[0, 0], padding])],
            torch.cat([order.inverse[0, 0], padding])[numbers],
        )


def to_heads(tensors: Sequence[Tensor], shard: HeadShard, places: Places) -> list[Tensor]:
    """This rank's heads of all tokens, in one exchange for all `tensors`.

    Args:
        tensors: `[B, H, n, D]` of one dtype, each: this rank's tokens with all heads.
        shard: which heads each rank takes.
        places: where the tokens of each rank go.

    Returns:
        `[B, own heads, N, D]` each.
    """
    batch, _, tokens, dim = tensors[0].shape
    row = len(tensors) * batch * dim
    sizes = [tokens * row * len(heads) for heads in shard.assignment]
    sent = tensors[0].new_empty(sum(sizes))
    for part, heads in zip(sent.split(sizes), shard.assignment, strict=True):
        lines = part.view(tokens, len(tensors), batch, len(heads), dim)
        for i, x in enumerate(tensors):
            lines[:, i] = _select(x.permute(2, 0, 1, 3), heads)
    own = len(shard.heads)
    received = sent.new_empty(sum(places.sizes), len(tensors), batch, own, dim)
    _all_to_all(received.view(-1), sent, [n * row * own for n in places.sizes], sizes, shard)
    if places.index is not None:
        received = received.index_select(0, places.index)
    return [x.permute(1, 2, 0, 3) for x in received.unbind(1)]


def to_tokens(x: Tensor, shard: HeadShard, places: Places) -> Tensor:
    """The way back: `[B, H, n, D]`, this rank's tokens with all heads, of `x` `[B, own heads, N, D]`."""
    batch, own, _, dim = x.shape
    lines = x.permute(2, 0, 1, 3)
    lines = lines.contiguous() if places.inverse is None else lines.index_select(0, places.inverse)
    tokens = places.sizes[shard.rank]
    sizes = [tokens * batch * len(heads) * dim for heads in shard.assignment]
    received = x.new_empty(sum(sizes))
    _all_to_all(received, lines.view(-1), sizes, [n * batch * own * dim for n in places.sizes], shard)
    whole = x.new_empty(batch, tokens, shard.total, dim)
    for part, heads in zip(received.split(sizes), shard.assignment, strict=True):
        lines = part.view(tokens, batch, len(heads), dim).transpose(0, 1)
        if _is_run(heads):
            whole[:, :, heads[0] : heads[0] + len(heads)] = lines
        else:
            whole[:, :, list(heads)] = lines
    return whole.transpose(1, 2)


def _select(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """The `heads` of `x` `[n, B, H, D]`."""
    return x[:, :, heads[0] : heads[0] + len(heads)] if _is_run(heads) else x[:, :, list(heads)]


def _is_run(heads: tuple[int, ...]) -> bool:
    return heads == tuple(range(heads[0], heads[0] + len(heads)))


def _all_to_all(out: Tensor, x: Tensor, out_sizes: list[int], in_sizes: list[int], shard: HeadShard) -> None:
    with told_of_losses("exchanging heads and tokens"):
        dist.all_to_all_single(out, x, out_sizes, in_sizes, group=shard.group)
