"""Random blocks: as many as asked, and nobody's choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dit_sparse import Site, TokenGrid
from dit_sparse.eval.floors import RandomBlocks

GRID = TokenGrid(2, 8, 16, text_len=20)
SITE = Site(GRID, layer=1, num_layers=3, step=2, num_steps=9)
Q = torch.zeros(1, 3, GRID.num_tokens, 8)


def _kept(method: RandomBlocks, site: Site = SITE) -> torch.Tensor:
    return method.plan(Q, Q, Q, site, None).block_mask.kept_blocks


def test_density_rows_and_text() -> None:
    plan = RandomBlocks(0.5, block=16).plan(Q, Q, Q, SITE, None)
    kept = plan.block_mask.kept_blocks
    assert plan.density.mean() == pytest.approx(0.5, abs=1 / 32)
    video = kept[..., :16, :16]
    assert (video.sum(-1) == video.sum(-1)[0, 0, 0]).all()
    assert kept[..., 16:, :].all()
    assert kept[..., 16:].all()


def test_the_same_place_has_the_same_blocks_and_others_have_others() -> None:
    method = RandomBlocks(0.25, block=16)
    kept = _kept(method)
    assert torch.equal(kept, _kept(method))
    assert not torch.equal(kept[:, 0], kept[:, 1])
    for other in (replace(SITE, layer=2), replace(SITE, branch="uncond"), replace(SITE, step=3)):
        assert not torch.equal(kept, _kept(method, other))
    assert not torch.equal(kept, _kept(RandomBlocks(0.25, block=16, seed=1)))


@pytest.mark.parametrize("density", [0, -1, 1.5, float("nan"), True])
def test_a_density_that_is_no_share_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match="density must be above 0 and at most 1"):
        RandomBlocks(density)
