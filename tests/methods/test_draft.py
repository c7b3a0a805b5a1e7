"""DraftAttention against a draft averaged and softmaxed patch by patch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dit_sparse import DraftAttention, Site, TokenGrid
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, inputs, smooth_inputs, tokens_of
from tests.methods.test_no_wait import NoWaiting


def patches(grid: TokenGrid, short: int, long: int) -> list[list[int]]:
    """Tokens of each patch, frame by frame."""
    high, wide = (short, long) if grid.height < grid.width else (long, short)
    found = []
    for f in range(grid.frames):
        for top in range(0, grid.height, high):
            for left in range(0, grid.width, wide):
                rows = range(top, min(top + high, grid.height))
                columns = range(left, min(left + wide, grid.width))
                found.append([(f * grid.height + y) * grid.width + x for y in rows for x in columns])
    return found


def literal_mask(q: Tensor, k: Tensor, grid: TokenGrid, density: float) -> Tensor:
    """`[N, N]` of one head: text and each row's best, then the largest of the draft while the budget lasts."""
    video = patches(grid, 2, 3)
    blocks = blocks_of(grid, video, 6)
    draft = []
    for queries, q_text in blocks:
        middle = q[queries].double().mean(0)
        weights = [
            0.0 if k_text else len(keys) * math.exp(float(middle @ k[keys].double().mean(0)) / math.sqrt(q.shape[-1]))
            for keys, k_text in blocks
        ]
        draft.append([-1.0 if q_text else weight / sum(weights) for weight in weights])
    kept = [[value == max(row) > 0 for value in row] for row in draft]
    areas = [[len(a) * len(b) for b, _ in blocks] for a, _ in blocks]
    count = range(len(blocks))
    sure = [[kept[i][j] or blocks[i][1] or blocks[j][1] for j in count] for i in count]
    left = density * grid.num_tokens**2 - sum(areas[i][j] for i in count for j in count if sure[i][j])
    for _, i, j in sorted((-draft[i][j], i, j) for i in count for j in count if not sure[i][j]):
        left -= areas[i][j]
        if left < 0:
            break
        kept[i][j] = True
    return tokens_of(blocks, blocks, kept)


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(2, 7, 4, text_len=5)], ids=str)
@pytest.mark.parametrize("density", [0.35, 0.7])
@pytest.mark.parametrize("in_order", [False, True])
def test_equals_the_literal_draft(grid: TokenGrid, density: float, in_order: bool) -> None:
    q, k, v = inputs(grid)
    method = DraftAttention(density=density, short=2, long=3)
    order = method.shared_order(grid, q.device)
    given = [order.permute(x) for x in (q, k, v)] if in_order else [q, k, v]
    plan = method.plan(*given, Site(grid, in_order=in_order), None)
    got = plan.token_mask()
    for b in range(2):
        for h in range(2):
            assert torch.equal(got[b, h], literal_mask(q[b, h], k[b, h], grid, density))
    check_text_and_rows(plan, grid)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met(density: float) -> None:
    plan = DraftAttention(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    method = DraftAttention(density=0.5, short=2, long=3)
    want = method.plan(q, k, v, Site(grid), None)
    with NoWaiting():
        got = method.plan(q, k, v, Site(grid), None)
    assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"short": 0}, "short"), ({"long": 0}, "long")]
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DraftAttention(**options)  # type: ignore[arg-type]
