"""BigBird and strided attention against sets written out row by row."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dit_sparse import BigBird, Site, Strided, TokenGrid
from dit_sparse.types import AttentionPlan
from tests.methods.literal import GRIDS, Block, fill, raster_blocks


def plan_of(method: BigBird | Strided, grid: TokenGrid) -> AttentionPlan:
    q = torch.zeros(1, 1, grid.num_tokens, 8)
    return method.plan(q, q, q, Site(grid), None)


def blocks_of(plan: AttentionPlan, grid: TokenGrid) -> list[Block]:
    bounds, index = plan.q_order.offsets[0, 0].tolist(), plan.q_order.index[0, 0].tolist()
    parts = [index[start:end] for start, end in pairwise(bounds)]
    text = range(grid.text_start, grid.text_start + grid.text_len)
    return [Block(tokens, tokens[0] in text) for tokens in parts]


def row_length(grid: TokenGrid, density: float, video: list[int]) -> int:
    """Video blocks of a row that, with all text kept, make up `density`."""
    text_pairs = grid.num_tokens**2 - grid.video_len**2
    return max(1, round((density * grid.num_tokens**2 - text_pairs) / grid.video_len**2 * len(video)))


def kept_in(row: int, mask: Tensor, blocks: list[Block]) -> list[int]:
    token = blocks[row].tokens[0]
    return [j for j, block in enumerate(blocks) if not block.is_text and bool(mask[token, block.tokens].all())]


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(3, 8, 8), TokenGrid(3, 8, 8, 9, True)], ids=str)
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("curve", [True, False])
def test_bigbird_is_window_and_global_and_random(grid: TokenGrid, density: float, curve: bool) -> None:
    method = BigBird(density, block=4, seed=3, window_share=0.375, global_share=0.25, curve=curve)
    plan = plan_of(method, grid)
    mask, blocks = plan.token_mask()[0, 0], blocks_of(plan, grid)
    video = [i for i, block in enumerate(blocks) if not block.is_text]
    row = row_length(grid, density, video)
    everywhere = video[: round(0.25 * row)]
    drawn = torch.rand(len(blocks), len(blocks), generator=torch.Generator().manual_seed(3))
    chosen = set()
    for i in range(len(blocks)):
        if i in everywhere:
            chosen |= {(i, j) for j in video}
            continue
        others = [j for j in video if j not in everywhere]
        near = sorted(others, key=lambda j, i=i: (abs(i - j), j))[: round(0.375 * row)]
        far = sorted((j for j in others if j not in near), key=lambda j, i=i: -float(drawn[i, j]))
        count = len(kept_in(next(n for n in video if n not in everywhere), mask, blocks))
        chosen |= {(i, j) for j in [*everywhere, *near, *far][:count]}
    assert torch.equal(mask, fill(chosen, blocks, blocks, grid.num_tokens))


@pytest.mark.parametrize("grid", [*GRIDS, TokenGrid(3, 8, 8), TokenGrid(3, 8, 8, 9, True)], ids=str)
@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("options", [{}, {"stride": 3, "sink": 0}, {"window_share": 0.0, "sink": 2, "stride": 2}])
def test_strided_is_sink_and_window_and_stride(grid: TokenGrid, density: float, options: dict) -> None:
    method = Strided(density, block=4, **options)
    plan = plan_of(method, grid)
    mask, blocks = plan.token_mask()[0, 0], raster_blocks(grid, 4)
    video = [i for i, block in enumerate(blocks) if not block.is_text]
    row, stride = row_length(grid, density, video), method.stride_for(grid)
    count, chosen = len(kept_in(video[0], mask, blocks)), set()
    for i in range(len(blocks)):
        nearest = sorted(video, key=lambda j, i=i: (abs(i - j), j))
        sink = [j for j in nearest if j in video[: method.sink]]
        near = [j for j in nearest if j not in sink][: round(method.window_share * max(0, row - method.sink))]
        ahead = [j for j in nearest if (i - j) % stride == 0]
        ranked = dict.fromkeys([*sink, *near, *ahead, *nearest])
        chosen |= {(i, j) for j in list(ranked)[:count]}
    assert torch.equal(mask, fill(chosen, blocks, blocks, grid.num_tokens))


@pytest.mark.parametrize("method", [BigBird, Strided])
@pytest.mark.parametrize("density", [0.125, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("text", [0, 40])
def test_density_is_met(method: type, density: float, text: int) -> None:
    grid = TokenGrid(6, 16, 16, text_len=text)
    assert float(plan_of(method(density, block=16), grid).density) == pytest.approx(max(density, 0.06), rel=0.1)


def test_the_default_stride_is_whole_frames() -> None:
    grid = TokenGrid(12, 16, 16)
    assert Strided(0.5, block=64).stride_for(grid) % 4 == 0
    assert Strided(0.1, block=64).stride_for(grid) > Strided(0.5, block=64).stride_for(grid)


def test_bigbirds_curve_is_the_shared_order() -> None:
    grid = TokenGrid(3, 8, 8)
    method = BigBird(block=16, curve=True)
    want = method.shared_order(grid, torch.device("cpu"))
    assert torch.equal(plan_of(method, grid).q_order.index, want.index)
    assert not want.is_identity
    assert BigBird(block=16).shared_order(grid, torch.device("cpu")).is_identity
    masks = [plan_of(BigBird(0.5, block=16, window_share=0.2, seed=seed), grid).token_mask() for seed in (0, 1)]
    assert not torch.equal(*masks)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (BigBird, {"density": 0}, "density"),
        (BigBird, {"window_share": 0.7, "global_share": 0.4}, "at most 1 together"),
        (BigBird, {"window_share": -0.1}, "window_share"),
        (Strided, {"stride": 0}, "stride"),
        (Strided, {"window_share": 1.5}, "window_share"),
        (Strided, {"sink": -1}, "sink"),
    ],
)
def test_bad_parameters(method: type, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)
