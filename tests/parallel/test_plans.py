"""A plan of all heads is put together from the ranks', whose exchange is replayed here in one process."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse.head_shard import HeadShard, select_heads
from dit_sparse.parallel.plans import gather_plan
from tests.kernels import cases

ASSIGNMENT = ((0, 2), (3, 1))


@pytest.mark.parametrize("levels", [None, (3, 0, 2, 1)])
def test_heads_come_back_where_they_were(levels: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = cases.random_plan(cases.EVEN, heads=4, density=0.4).with_remainder("mass")
    own = None if levels is None else torch.tensor([levels], dtype=torch.int8)
    plan = replace(plan, head_remainders=own)
    agreement: Any = SimpleNamespace(check=lambda *_: None, gather=lambda _, value: [value, value])
    shards = [HeadShard(ASSIGNMENT, rank, None) for rank in range(2)]
    sent: list[list[Tensor]] = [[], []]

    def listen(shard: HeadShard, x: Tensor) -> Tensor:
        sent[shard.rank].append(x)
        return torch.cat([x, x], 1)

    monkeypatch.setattr(HeadShard, "gather", listen)
    for shard in shards:
        gather_plan(plan.of_heads(shard.heads), shard, agreement)
    exchanged = zip(*sent, strict=True)
    monkeypatch.setattr(
        HeadShard, "gather", lambda shard, x: select_heads(torch.cat(next(exchanged), 1), shard.inverse)
    )
    got = gather_plan(plan.of_heads(shards[0].heads), shards[0], agreement)
    assert next(exchanged, None) is None
    assert torch.equal(got.block_mask.kept_blocks, plan.block_mask.kept_blocks)
    assert got.remainder == "mass"
    if own is None:
        assert got.head_remainders is None
    else:
        assert torch.equal(got.head_remainders, own)
