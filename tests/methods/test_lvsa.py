"""LVSA against frames listed one by one, and windows grown step by step."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import Lvsa, Site, TokenGrid
from dit_sparse.types import AttentionPlan
from tests.methods.layouts import check_text_and_rows, coordinates

GRIDS = [
    TokenGrid(13, 2, 3),
    TokenGrid(9, 2, 5, text_len=5, text_first=True),
    TokenGrid(6, 3, 3, text_len=3),
    TokenGrid(1, 12, 4, text_len=4),
    TokenGrid(2, 2, 2),
]


def plan_of(method: Lvsa, grid: TokenGrid, step: int = 0) -> AttentionPlan:
    q = torch.zeros(1, 1, grid.num_tokens, 4)
    return method.plan(q, q, q, Site(grid, step=step, num_steps=50), None)


def key_frames(frames: int, first: int, keys: int, step: int) -> set[int]:
    """The first frames, and marks set evenly on the others, all of which stand `step` places further, going round."""
    others = list(range(frames))[first:]
    marks = [place for place in range(len(others)) if (place * keys) % len(others) < keys]
    return set(range(frames)[:first]) | {others[(mark + step) % len(others)] for mark in marks}


def grown_window(frame: int, frames: int, near: int, shared: set[int]) -> set[int]:
    """Frames around one, taken outward by turns, until `near` of them are no key frames."""
    found = {frame}
    for distance in range(1, frames):
        if len(found - shared) >= near:
            break
        for other in (frame - distance, frame + distance):
            if 0 <= other < frames and len(found - shared) < near:
                found.add(other)
    return found


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
@pytest.mark.parametrize(("window", "first"), [(3, 1), (1, 2), (0, 0)])
@pytest.mark.parametrize("step", [0, 7])
def test_equals_the_frames_listed_one_by_one(grid: TokenGrid, share: float, window: int, first: int, step: int) -> None:
    frames = grid.frames if grid.frames > 1 else grid.height
    wanted = max(1, round(share * frames))
    near = min(2 * window + 1, max(1, wanted // 2))
    keys = min(wanted - near, frames) - first
    shared = key_frames(frames, first, keys, step) if keys > 0 else set(range(frames)[:first])
    mask = plan_of(Lvsa(share, window, first, block=4), grid, step).token_mask()[0, 0]
    text = range(grid.text_start, grid.text_start + grid.text_len)
    for query in range(grid.num_tokens):
        own = coordinates(grid, query)[0 if grid.frames > 1 else 1]
        seen = shared | grown_window(own, frames, near, shared)
        for key in range(grid.num_tokens):
            frame = coordinates(grid, key)[0 if grid.frames > 1 else 1]
            assert bool(mask[query, key]) == (query in text or key in text or frame in seen)


def test_every_frame_is_a_key_frame_in_its_turn() -> None:
    grid, method = TokenGrid(20, 2, 2), Lvsa(0.3, block=4)
    seen = torch.stack([plan_of(method, grid, step).token_mask()[0, 0, 0] for step in range(20)])
    assert not seen.all(0)[40:].any()
    assert seen.any(0).all()
    densities = {float(plan_of(method, grid, step).density) for step in range(20)}
    assert min(densities) == max(densities) == pytest.approx(0.3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_text_is_kept_and_no_row_is_empty(grid: TokenGrid) -> None:
    check_text_and_rows(plan_of(Lvsa(0.2, 0, 0, block=4), grid, 3), grid)


def test_one_plan_serves_all_layers_and_branches_of_a_step() -> None:
    grid, method = TokenGrid(6, 4, 4), Lvsa()
    assert plan_of(method, grid, 2) is plan_of(method, grid, 2)


@pytest.mark.parametrize(
    ("options", "message"), [({"share": 0}, "share"), ({"window": -1}, "window"), ({"first": -1}, "first")]
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lvsa(**options)  # type: ignore[arg-type]
