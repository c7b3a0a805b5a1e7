"""Radial attention against its bands written out token by token, and rounded to blocks column by column."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import RadialAttention, Site, TokenGrid
from tests.methods.layouts import DEMO, GRIDS, blocks_of, check_text_and_rows, inputs, tokens_of


def plan_of(method: RadialAttention, grid: TokenGrid):
    q = torch.zeros(1, 1, grid.num_tokens, 4)
    return method.plan(q, q, q, Site(grid), None)


def frame_blocks(grid: TokenGrid, block: int) -> list[list[int]]:
    """Each frame in equal parts of at most `block` tokens."""
    tokens = grid.height * grid.width
    parts = -(-tokens // block)
    return [
        [f * tokens + t for t in range(p * tokens // parts, (p + 1) * tokens // parts)]
        for f in range(grid.frames)
        for p in range(parts)
    ]


def sees(grid: TokenGrid, block: int, decay: float, query: int, key: int) -> bool:
    """Whether one video token sees another, both as raster numbers."""
    tokens = grid.height * grid.width
    distance = abs(query // tokens - key // tokens)
    if key // tokens == 0 or distance <= 1:
        return True
    group = distance.bit_length()
    length = 2 ** tokens.bit_length() / 2**group
    if length < block and distance % int(block / length) != 0:
        return False
    return abs(query % tokens - key % tokens) <= max(length * decay, block)


def literal_mask(grid: TokenGrid, block: int, decay: float) -> torch.Tensor:
    video = frame_blocks(grid, block)
    kept = []
    for queries in video:
        row = []
        for keys in video:
            columns = [sum(sees(grid, block, decay, q, k) for q in queries) / len(queries) for k in keys]
            touched = [c for c in columns if c > 0]
            row.append(bool(touched) and sum(c > 1 / 3 for c in touched) / len(touched) > 0.6)
        kept.append(row)
    blocks = blocks_of(grid, video, block)
    first = len(blocks) - len(video) if grid.text_first else 0
    wide = [[False] * len(blocks) for _ in blocks]
    for i, row in enumerate(kept):
        wide[first + i][first : first + len(video)] = row
    return tokens_of(blocks, blocks, wide)


@pytest.mark.parametrize(
    "grid", [*GRIDS, TokenGrid(9, 3, 11), TokenGrid(12, 2, 7, text_len=3), TokenGrid(7, 5, 5, 4, True)], ids=str
)
@pytest.mark.parametrize(("block", "decay"), [(4, 1.0), (5, 0.4), (2, 0.6)])
def test_equals_the_literal_bands(grid: TokenGrid, block: int, decay: float) -> None:
    method = RadialAttention(decay=decay, block=block)
    got = plan_of(method, grid)
    assert torch.equal(got.token_mask()[0, 0], literal_mask(grid, block, decay))
    check_text_and_rows(got, grid)


def test_bands_narrow_and_far_frames_thin_out() -> None:
    """The cases of the definition do occur: a whole frame, a band, a dropped and a kept far frame."""
    grid = TokenGrid(12, 2, 20)
    mask = plan_of(RadialAttention(block=8, decay=0.5, sink=False), grid).token_mask()[0, 0]
    shares = [float(mask[440:480, 40 * f : 40 * f + 40].double().mean()) for f in range(12)]
    assert shares[11] == shares[10] == 1.0
    assert 0 < shares[8] < 1
    assert {share > 0 for share in shares[:4]} == {True, False}


def test_batches_share_the_plan() -> None:
    grid = GRIDS[1]
    plan = RadialAttention(block=4).plan(*inputs(grid, batch=2), Site(grid), None)
    assert plan.block_mask.kv_counts.shape[:2] == (1, 1)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
@pytest.mark.parametrize("grid", [DEMO, TokenGrid(21, 8, 13), TokenGrid(5, 16, 16, text_len=40)], ids=str)
def test_the_density_is_met_where_it_is_the_control(grid: TokenGrid, density: float) -> None:
    plan = plan_of(RadialAttention(density=density, block=32), grid)
    assert float(plan.density) == pytest.approx(density, rel=0.1)
    check_text_and_rows(plan, grid)


def test_by_density_what_stays_is_nearest_in_bands() -> None:
    """No block that is dropped is nearer, for the reach of its frames, than one that is kept at its distance."""
    grid = TokenGrid(9, 4, 16)
    mask = plan_of(RadialAttention(density=0.3, block=8, sink=False), grid).token_mask()[0, 0]
    for f in range(9):
        for g in range(9):
            part = mask[64 * f : 64 * f + 64 : 8, 64 * g : 64 * g + 64 : 8]
            kept = {abs(i - j) for i in range(8) for j in range(8) if part[i, j]}
            dropped = {abs(i - j) for i in range(8) for j in range(8) if not part[i, j]}
            assert not kept or not dropped or max(kept) <= min(dropped)


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"decay": 0}, "decay"), ({"block": 0}, "bl")]
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadialAttention(**options)  # type: ignore[arg-type]
