"""A plan cut at the ranks' bounds, its parts merged by their row sums, is the plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_sparse import AdaSpa, AttentionPlan, Neighborhood, Site, SparseVideoGen2, TokenGrid, sparse_attention
from dit_sparse.parallel import SequenceSplit
from dit_sparse.parallel.ring import Chunk, cut_plan, merge

GRID = TokenGrid(3, 6, 7, 5)


def tensors(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, tokens, 16, generator=generator, dtype=torch.float64).float() for _ in range(3)]


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize(
    "method",
    [
        Neighborhood(density=0.4, tile=(2, 3, 3)),
        AdaSpa(density=0.4, block=16),
        SparseVideoGen2(density=0.4, q_tokens=20, k_tokens=10),
    ],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("backend", ["reference", "gather"])
def test_parts_of_a_plan_are_the_plan(method: Any, ranks: int, text_first: bool, backend: str) -> None:
    grid = TokenGrid(*GRID.shape, GRID.text_len, text_first)
    q, k, v = tensors(grid.num_tokens)
    plan = method.plan(q, k, v, Site(grid), None)
    want, want_lse = sparse_attention(q, k, v, plan, backend="reference", return_lse=True)
    split = SequenceSplit(grid, ranks)
    chunks = [Chunk(split.runs(rank), grid.num_tokens) for rank in range(ranks)]
    kept = plan.token_mask().expand(2, 3, -1, -1)
    for rank, chunk in enumerate(chunks):
        own = chunk.numbers(q.device)
        plans = cut_plan(AttentionPlan(plan.q_order, plan.kv_order, plan.block_mask), chunks, rank)
        parts = []
        for part, other in zip(plans, chunks, strict=True):
            keys = other.numbers(q.device)
            assert torch.equal(part.token_mask().expand(2, 3, -1, -1), kept[:, :, own][:, :, :, keys])
            parts.append(
                sparse_attention(q[:, :, own], k[:, :, keys], v[:, :, keys], part, backend=backend, return_lse=True)
            )
        out, lse = parts[0]
        for part in parts[1:]:
            out, lse = merge((out, lse), part)
        assert torch.allclose(out, want[:, :, own], atol=1e-5)
        assert torch.allclose(lse, want_lse[:, :, own], atol=1e-5)


def test_rows_without_keys_merge() -> None:
    out, lse = torch.ones(1, 1, 3, 2), torch.tensor([[[0.0, 1.0, -torch.inf]]])
    nothing = torch.zeros(1, 1, 3, 2), torch.full((1, 1, 3), -torch.inf)
    got, got_lse = merge((out, lse), nothing)
    assert torch.equal(got[0, 0, :2], out[0, 0, :2])
    assert torch.equal(got[0, 0, 2], torch.zeros(2))
    assert torch.equal(got_lse, lse)


def test_padding_is_cut_off() -> None:
    split = SequenceSplit(GRID, 2)
    assert [Chunk(split.runs(rank), GRID.num_tokens).size for rank in (0, 1)] == [66, 65]
    assert [Chunk(split.runs(rank), GRID.video_len + 1).size for rank in (0, 1)] == [64, 63]


def test_what_is_of_whole_blocks_is_refused() -> None:
    q, k, v = tensors(GRID.num_tokens)
    plan = AdaSpa(density=0.4, block=16).plan(q, k, v, Site(GRID), None)
    chunks = [Chunk([(0, 64)], 131), Chunk([(64, 131)], 131)]
    with pytest.raises(ValueError, match="remainder must be 'none' in a ring, got 'mean'"):
        cut_plan(plan.with_remainder("mean"), chunks, 0)
    with pytest.raises(ValueError, match=r"skip_threshold must be 0 in a ring, got 0.1: whole blocks"):
        cut_plan(plan.with_skip(0.1), chunks, 0)


def test_a_long_order_is_cut_once_though_it_is_packed_between_its_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting it reads its blocks' sizes back from the device."""
    monkeypatch.setattr("dit_sparse.token_order.PACKED_FROM", 1)
    q, k, v = tensors(GRID.num_tokens)
    split = SequenceSplit(GRID, 2)
    chunks = [Chunk(split.runs(rank), GRID.num_tokens) for rank in range(2)]
    plan = SparseVideoGen2(density=0.4, q_tokens=20, k_tokens=10).plan(q, k, v, Site(GRID), None)
    at_rest = plan.pack()
    want = [(part.q_order, part.kv_order) for part in cut_plan(plan, chunks, 0)]
    del plan
    assert [(part.q_order, part.kv_order) for part in cut_plan(at_rest.unpack(), chunks, 0)] == want
