"""LoSA against masses summed one by one."""

from __future__ import annotations

import pytest
import torch

from dit_sparse import LoSA, Schedule, Site, TokenGrid
from dit_sparse.types import Previous
from tests.methods.layouts import DEMO, check_text_and_rows, smooth_inputs
from tests.methods.literal import GRIDS, fill, random_qkv, raster_blocks, weights_of


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("retained", [0.5, 0.9, 0.99])
def test_equals_the_literal_selection(grid: TokenGrid, retained: float) -> None:
    q, k, v = random_qkv(grid)
    plan = LoSA(retained, block=4).plan(q, k, v, Site(grid), None)
    blocks = raster_blocks(grid, 4)
    video = [j for j, block in enumerate(blocks) if not block.is_text]
    for b in range(2):
        for h in range(3):
            weights, chosen = weights_of(q[b, h], k[b, h]), set()
            for i, query in enumerate(blocks):
                mass = {j: float(weights[query.tokens][:, blocks[j].tokens].sum()) for j in video}
                reached = 0.0
                for j in sorted(video, key=lambda j, m=mass: -m[j]):
                    if reached >= retained * sum(mass.values()):
                        break
                    chosen.add((i, j))
                    reached += mass[j]
            assert torch.equal(plan.token_mask()[b, h], fill(chosen, blocks, blocks, grid.num_tokens))
    check_text_and_rows(plan, grid)


def test_the_row_sums_of_the_dense_step_serve() -> None:
    grid = GRIDS[1]
    q, k, v = random_qkv(grid)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    want = LoSA(0.9, block=4).plan(q, k, v, Site(grid), None)
    got = LoSA(0.9, block=4).plan(q, k, v, Site(grid), Previous(lse=lse))
    assert torch.equal(got.token_mask(), want.token_mask())
    # Row sums decide how queries of a block weigh against each other.
    other = LoSA(0.9, block=4).plan(q, k, v, Site(grid), Previous(lse=lse + 3 * torch.randn_like(lse)))
    assert not torch.equal(other.token_mask(), want.token_mask())


def test_blocks_are_frozen_after_the_first_sparse_step() -> None:
    schedule, grid = Schedule(LoSA(block=4)), GRIDS[0]
    q, k, v = random_qkv(grid)
    assert schedule.decide(Site(grid, step=3, num_steps=20), None).keep_lse
    lse = torch.zeros(q.shape[:3])
    assert schedule.decide(Site(grid, step=4, num_steps=20), Previous(lse=lse)).action == "plan"
    previous = Previous(schedule.method.plan(q, k, v, Site(grid), None), lse, 4)
    assert {schedule.decide(Site(grid, step=step, num_steps=20), previous).action for step in range(5, 20)} == {"reuse"}


@pytest.mark.parametrize("density", [0.125, 0.25, 0.5])
def test_the_density_is_met_where_it_is_the_control(density: float) -> None:
    plan = LoSA(density=density, row_stride=4).plan(*smooth_inputs(DEMO, heads=1), Site(DEMO), None)
    assert float(plan.density.mean()) == pytest.approx(density, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"density": 0}, "density"), ({"retained": 2}, "retained"), ({"block": 0}, "block"), ({"row_stride": 0}, "row_")],
)
def test_bad_parameters(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoSA(**options)  # type: ignore[arg-type]
