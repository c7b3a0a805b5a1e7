"""Sliding tile attention against its windows written out token by token."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import Site, SlidingTile, TokenGrid
from dit_sparse.masks import probe_rows
from tests.methods.layouts import DEMO, GRIDS, check_text_and_rows, coordinates, inputs, smooth_inputs
from tests.methods.test_no_wait import NoWaiting


def literal_mask(grid: TokenGrid, tile: tuple[int, int, int], window: tuple[int, int, int]) -> torch.Tensor:
    """`[N, N]`: the centre of a window is the query's tile, held away from the borders by half a window."""
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    video = range(grid.video_start, grid.video_start + grid.video_len)
    for query in video:
        for key in video:
            for q, k, length, size, wide in zip(
                coordinates(grid, query), coordinates(grid, key), grid.shape, tile, window, strict=True
            ):
                tiles = -(-length // size)
                wide = min(wide, tiles)
                first = min(max(q // size - wide // 2, 0), tiles - wide)
                if not first <= k // size < first + wide:
                    mask[query, key] = False
    return mask


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("window", [(1, 1, 3), (3, 2, 1), (2, 9, 2)])
def test_a_given_window_is_the_literal_one(grid: TokenGrid, window: tuple[int, int, int]) -> None:
    q, k, v = inputs(grid)
    plan = SlidingTile(window=window, tile=(1, 2, 2)).plan(q, k, v, Site(grid), None)
    assert torch.equal(plan.token_mask()[0, 0], literal_mask(grid, (1, 2, 2), window))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("in_order", [False, True])
def test_each_head_takes_the_window_that_errs_least(grid: TokenGrid, in_order: bool) -> None:
    q, k, v = inputs(grid, heads=3)
    method = SlidingTile(density=0.5, tile=(1, 2, 2), candidates=3, rows=7)
    windows = method.windows_for(grid)
    order = method.shared_order(grid, q.device)
    given = [order.permute(x) for x in (q, k, v)] if in_order else [q, k, v]
    plan = method.plan(*given, Site(grid, in_order=in_order), None)
    assert plan.q_order is order
    check_text_and_rows(plan, grid)
    rows = probe_rows(grid, 7, q.device).tolist()
    masks = [literal_mask(grid, (1, 2, 2), window) for window in windows]
    got = plan.token_mask()
    for b in range(2):
        for h in range(3):
            errors = []
            for mask in masks:
                error = 0.0
                for row in rows:
                    logits = (k[b, h] @ q[b, h, row] / q.shape[-1] ** 0.5).double()
                    part = logits.masked_fill(~mask[row], -torch.inf).softmax(0) - logits.softmax(0)
                    error += float((part @ v[b, h].double()).square().sum())
                errors.append(error)
            assert torch.equal(got[b, h] if len(windows) > 1 else got[0, 0], masks[errors.index(min(errors))])


def test_heads_of_time_and_of_space_take_unlike_windows() -> None:
    grid = TokenGrid(8, 8, 8)
    method = SlidingTile(density=0.25, tile=(1, 4, 4))
    place = torch.arange(64).repeat(8)
    frame = torch.arange(8).repeat_interleave(64)
    time, space = torch.eye(64)[place], torch.eye(64)[frame]
    q = 60 * torch.stack([time, space])[None]
    v = torch.randn(1, 2, 512, 8, generator=torch.Generator().manual_seed(0))
    mask = method.plan(q, q, v, Site(grid), None).token_mask()[0]
    assert mask[0][place[:, None] == place].all()
    assert mask[1][frame[:, None] == frame].all()


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("grid", [DEMO, TokenGrid(21, 30, 52), TokenGrid(21, 45, 80, text_len=256)], ids=str)
def test_windows_are_as_near_to_the_density_as_tiles_allow(grid: TokenGrid, density: float) -> None:
    windows = SlidingTile(density=density).windows_for(grid)
    assert 1 <= len(set(windows)) == len(windows) <= 6
    if grid == DEMO:
        plan = SlidingTile(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
        assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 6, text_len=3)
    q, k, v = inputs(grid)
    method = SlidingTile(density=0.5, tile=(1, 2, 2))
    want = method.plan(q, k, v, Site(grid), None)
    with NoWaiting():
        got = method.plan(q, k, v, Site(grid), None)
    assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "density"),
        ({"window": 0}, "window must be"),
        ({"tile": (1, 2)}, "tile must be"),
        ({"candidates": 0}, "candidates"),
    ],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingTile(**options)  # type: ignore[arg-type]
