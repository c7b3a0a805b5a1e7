"""Sparse VideoGen against its bands written out token by token, and heads chosen by errors computed one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dit_sparse import Site, SparseVideoGen, TokenGrid
from dit_sparse.masks import probe_rows
from dit_sparse.methods.svg import _fixed, sink_blocks
from tests.methods.layouts import DEMO, GRIDS, check_text_and_rows, coordinates, inputs, smooth_inputs
from tests.methods.test_no_wait import NoWaiting


def literal_places(grid: TokenGrid, temporal: bool) -> dict[int, int]:
    """Place of each video token in the order: frame by frame, or for each place all frames."""
    places = {}
    for token in range(grid.video_start, grid.video_start + grid.video_len):
        f, h, w = coordinates(grid, token)
        places[token] = (h * grid.width + w) * grid.frames + f if temporal else (f * grid.height + h) * grid.width + w
    return places


def literal_mask(grid: TokenGrid, block: int, width: int, sink: int, temporal: bool) -> Tensor:
    """`[N, N]`: blocks less than `width` apart, the first `sink` blocks as keys, and text."""
    places = literal_places(grid, temporal)
    mask = torch.ones(grid.num_tokens, grid.num_tokens, dtype=torch.bool)
    for query, at in places.items():
        for key, other in places.items():
            mask[query, key] = abs(at // block - other // block) < width or other // block < sink
    return mask


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("density", [0.3, 0.6])
def test_equals_the_literal_bands(grid: TokenGrid, density: float) -> None:
    """Between the bands of two neighbouring widths, under the order with the smaller literal error."""
    method = SparseVideoGen(density=density, block=4, rows=6)
    q, k, v = inputs(grid)
    got = method.plan(q, k, v, Site(grid), None).token_mask()
    sink, blocks = sink_blocks(method, grid), -(-grid.video_len // 4)
    bands = [[literal_mask(grid, 4, width, sink, t) for t in (False, True)] for width in range(blocks + 2)]
    width = max(w for w in range(blocks + 1) if (bands[w][0] & ~got_spatial(method, grid)).sum() == 0)
    assert width > 0
    rows = probe_rows(grid, 6, q.device).tolist()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            errors = []
            for temporal in (False, True):
                mask = _fixed(method, grid, q.device).masks[int(temporal)]
                assert (bands[width][int(temporal)][rows] & ~mask).sum() == 0
                error = 0.0
                for place, row in enumerate(rows):
                    logits = k[b, h] @ q[b, h, row] / q.shape[-1] ** 0.5
                    seen = logits.masked_fill(~mask[place], -torch.inf).softmax(0) @ v[b, h]
                    error += float((seen - logits.softmax(0) @ v[b, h]).square().sum())
                errors.append(error)
            temporal = int(errors[1] < errors[0])
            assert (bands[width][temporal] & ~got[b, h]).sum() == 0
            assert (got[b, h] & ~bands[width + 1][temporal]).sum() == 0


def got_spatial(method: SparseVideoGen, grid: TokenGrid) -> Tensor:
    """The band in the raster order, whichever heads take it."""
    fixed = _fixed(method, grid, torch.device("cpu"))
    block = torch.tensor([i for i, size in enumerate(fixed.orders[0].block_sizes[0, 0].tolist()) for _ in range(size)])
    kept = fixed.block_mask.full_blocks[0, 0]
    return kept[block][:, block]


def test_both_kinds_of_heads_are_found() -> None:
    """A head that looks along its frame and one that looks along time, made so by hand."""
    grid = TokenGrid(6, 4, 4)
    f = torch.arange(6).repeat_interleave(16)
    place = torch.arange(16).repeat(6)
    spatial, temporal = torch.eye(16)[f], torch.eye(16)[place]
    q = 30 * torch.stack([spatial, temporal])[None]
    v = torch.randn(1, 2, 96, 16, generator=torch.Generator().manual_seed(0))
    plan = SparseVideoGen(density=0.3, block=8, sink=False).plan(q, q, v, Site(grid), None)
    mask = plan.token_mask()[0]
    assert mask[0][f[:, None] == f].all()
    assert mask[1][place[:, None] == place].all()
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_text_is_kept_and_no_row_is_empty(grid: TokenGrid) -> None:
    check_text_and_rows(SparseVideoGen(density=0.2, block=4).plan(*inputs(grid), Site(grid), None), grid)


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met(density: float) -> None:
    plan = SparseVideoGen(density=density).plan(*smooth_inputs(DEMO), Site(DEMO), None)
    assert plan.density.tolist() == [[pytest.approx(density, rel=0.1)] * 1]


def test_the_second_plan_on_a_grid_reads_nothing_back() -> None:
    grid = TokenGrid(3, 4, 5, text_len=3)
    q, k, v = inputs(grid)
    method = SparseVideoGen(density=0.4, block=4)
    want = method.plan(q, k, v, Site(grid), None)
    with NoWaiting():
        got = method.plan(q, k, v, Site(grid), None)
    assert torch.equal(got.token_mask(), want.token_mask())


@pytest.mark.parametrize(
    ("options", "message"), [({"density": 0}, "density"), ({"block": 0}, "block"), ({"rows": 0}, "rows must be")]
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVideoGen(**options)  # type: ignore[arg-type]
