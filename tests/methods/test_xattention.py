"""XAttention against antidiagonals summed score by score."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from dit_sparse import Site, TokenGrid, XAttention
from dit_sparse.kernels import antidiagonal_scores
from tests.kernels.test_block_mass import needs_interpreter
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, cut, inputs, smooth_inputs, tokens_of
from tests.methods.test_no_wait import NoWaiting


def literal_shares(q: Tensor, k: Tensor, blocks: list[tuple[list[int], bool]], stride: int) -> list[list[float]]:
    """Of every two blocks of one head: antidiagonals summed in squares of `stride`, softmax over all, summed."""
    groups = [cut(tokens, stride) for tokens, _ in blocks]
    rows = []
    for q_groups in groups:
        sums = [0.0] * len(groups)
        for q_group in q_groups:
            logits = []
            for k_groups in groups:
                for k_group in k_groups:
                    total = 0.0
                    for s in range(stride):
                        if stride - 1 - s < len(q_group) and s < len(k_group):
                            total += float(q[q_group[stride - 1 - s]].double() @ k[k_group[s]].double())
                    logits.append(total / math.sqrt(q.shape[-1]) / stride)
            weights = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
            for j, k_groups in enumerate(groups):
                for _ in k_groups:
                    sums[j] += weights.pop(0)
        rows.append(sums)
    return rows


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, block: int, stride: int, p: float) -> Tensor:
    """`[N, N]` of one head."""
    blocks = blocks_of(grid, cut(range(grid.video_len), block), block)
    kept = []
    for row in literal_shares(q, k, blocks, stride):
        video = [0.0 if is_text else share for share, (_, is_text) in zip(row, blocks, strict=True)]
        chosen, reached = set(), 0.0
        for j in sorted(range(len(video)), key=lambda j: -video[j]):
            if reached >= p * sum(video):
                break
            chosen.add(j)
            reached += video[j]
        kept.append([j in chosen for j in range(len(video))])
    return tokens_of(blocks, blocks, kept)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.9])
def test_equals_the_literal_antidiagonals(grid: TokenGrid, p: float) -> None:
    q, k, v = inputs(grid)
    plan = XAttention(top_p=p, block=8, stride=4).plan(q, k, v, Site(grid), None)
    got = plan.token_mask()
    for b in range(2):
        for h in range(2):
            assert torch.equal(got[b, h], literal_mask(q[b, h], k[b, h], grid, 8, 4, p))
    check_text_and_rows(plan, grid)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = XAttention(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@needs_interpreter
def test_the_second_plan_on_a_grid_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the scores come from the Triton kernel, whose interpreter is left alone."""
    home = sys.modules[antidiagonal_scores.__module__]
    launch = home._by_triton

    def unwatched(*args: Any) -> Tensor:
        with _disable_current_modes():
            return launch(*args)

    monkeypatch.setattr(home, "_by_triton", unwatched)
    for name in ("use_triton", "check_offsets"):
        monkeypatch.setattr(home, name, lambda *_: True)
    grid = TokenGrid(2, 4, 6, text_len=3)
    q, k, v = inputs(grid, dim=16)
    for method in (XAttention(block=16, stride=4), XAttention(density=0.5, block=16, stride=4)):
        want = method.plan(q, k, v, Site(grid), None)
        with NoWaiting():
            got = method.plan(q, k, v, Site(grid), None)
        assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"top_p": 1.1}, "top_p"), ({"block": 0}, "block"), ({"stride": 0}, "stride")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XAttention(**options)  # type: ignore[arg-type]
