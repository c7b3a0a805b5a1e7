"""The all-to-all of Ulysses: from a part of the tokens with all heads to all tokens with a part of the heads, and back.

Source: DeepSpeed-Ulysses (arXiv 2309.14509), section 3.1. Heads go to ranks by any assignment and need not divide by
them, and neither need tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from dit_sparse.head_shard import HeadShard
from dit_sparse.lost_ranks import told_of_losses

__all__ = ["to_heads", "to_tokens"]

Runs = Sequence[tuple[int, int]]


def to_heads(tensors: Sequence[Tensor], shard: HeadShard, runs: Sequence[Runs]) -> list[Tensor]:
    """This rank's heads of the whole sequence, in one exchange for all `tensors`.

    Args:
        tensors: `[B, H, n, D]` of one dtype, each: this rank's tokens with all heads.
        shard: which heads each rank takes.
        runs: for each rank the runs `(start, end)` of the sequence that it holds, in the order it holds them.

    Returns:
        `[B, own heads, N, D]` each, tokens in the sequence's own order.
    """
    batch, heads, tokens, dim = tensors[0].shape
    assert heads == shard.total
    order = list(shard.order)
    sent = tensors[0].new_empty(heads, len(tensors), batch, tokens, dim)
    for i, x in enumerate(tensors):
        by_head = x.transpose(0, 1)
        sent[:, i] = by_head if order == list(range(heads)) else by_head[order]
    own, sizes = len(shard.heads), [_length(run) for run in runs]
    row = len(tensors) * batch * dim
    received = sent.new_empty(own * row * sum(sizes))
    _all_to_all(
        received, sent.flatten(), [own * row * n for n in sizes], [len(h) * row * tokens for h in shard.assignment], shard
    )
    whole = sent.new_empty(own, len(tensors), batch, sum(sizes), dim)
    for part, own_runs, n in zip(received.split([own * row * n for n in sizes]), runs, sizes, strict=True):
        place = part.view(own, len(tensors), batch, n, dim)
        at = 0
        for start, end in own_runs:
            whole[..., start:end, :] = place[..., at : at + end - start, :]
            at += end - start
    return [x.transpose(0, 1) for x in whole.unbind(1)]


def to_tokens(x: Tensor, shard: HeadShard, runs: Sequence[Runs]) -> Tensor:
    """The way back: `[B, H, n, D]`, this rank's tokens with all heads, of `x` `[B, own heads, N, D]`."""
    batch, own, _, dim = x.shape
    by_head = x.transpose(0, 1)
    sizes = [_length(run) for run in runs]
    sent = x.new_empty(own * batch * dim * sum(sizes))
    for part, own_runs, n in zip(sent.split([own * batch * dim * n for n in sizes]), runs, sizes, strict=True):
        at, place = 0, part.view(own, batch, n, dim)
        for start, end in own_runs:
            place[:, :, at : at + end - start] = by_head[:, :, start:end]
            at += end - start
    row = batch * sizes[shard.rank] * dim
    received = x.new_empty(shard.total, batch, sizes[shard.rank], dim)
    _all_to_all(
        received.view(-1),
        sent,
        [len(heads) * row for heads in shard.assignment],
        [own * batch * dim * n for n in sizes],
        shard,
    )
    inverse = list(shard.inverse)
    return (received if inverse == sorted(inverse) else received[inverse]).transpose(0, 1)


def _all_to_all(out: Tensor, x: Tensor, out_sizes: list[int], in_sizes: list[int], shard: HeadShard) -> None:
    with told_of_losses("exchanging heads and tokens"):
        dist.all_to_all_single(out, x, out_sizes, in_sizes, group=shard.group)


def _length(runs: Runs) -> int:
    return sum(end - start for start, end in runs)
