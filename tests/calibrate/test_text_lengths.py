"""Prompts of unlike length give one plan, where text stands in the video's sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dit_sparse import Paro, Site, TokenGrid
from dit_sparse.calibrate.observers import MassSums, OrderSearch
from dit_sparse.calibrate.run import Calibration, write_calibration
from dit_sparse.calibrate.store import MassStore
from dit_sparse.methods.plan_file import PlanFile


@pytest.mark.parametrize("text_first", [False, True])
def test_text_of_any_length_is_averaged_over_and_served(tmp_path: Path, text_first: bool) -> None:
    grids = [TokenGrid(2, 4, 8, length, text_first) for length in (5, 19)]
    method = Paro(density=0.6, block=8)
    search = OrderSearch(method)
    torch.manual_seed(0)
    calls = []
    for grid in grids:
        q, k = torch.randn(2, 1, 2, grid.num_tokens, 8)
        calls.append((Site(grid), q, k, (q @ k.mT / 8**0.5).logsumexp(-1)))
    for call in calls:
        search(*call)
    assert search.grid == grids[0]
    path = tmp_path / "plan.safetensors"
    with MassStore(tmp_path, 1) as store:
        sums = MassSums(store, search.axes(), 8, (0.0,), grids[0])
        for call in calls:
            sums(*call)
        write_calibration(path, Calibration(method, shared_from=0), search, store, search.axes())
    PlanFile.open(path).verify()
    for site, q, k, _ in calls:
        mask = Paro(plan_file=str(path)).plan(q, k, k, site, None).token_mask()
        text = slice(site.grid.text_start, site.grid.text_start + site.grid.text_len)
        assert mask[:, :, text].all()
        assert mask[..., text].all()
        assert not mask.all()
    with pytest.raises(ValueError, match="prompts must all give one token grid"):
        search(Site(TokenGrid(2, 4, 4)), *calls[0][1:])
