"""The dense baseline keeps every block, and says so."""

from __future__ import annotations

import torch

from dit_sparse import Dense, Site, TokenGrid


def test_everything_is_kept() -> None:
    grid = TokenGrid(3, 5, 7, text_len=11, text_first=True)
    q = torch.randn(1, 2, grid.num_tokens, 16)
    plan = Dense().plan(q, q, q, Site(grid), None)
    assert plan.block_mask.is_full
    assert plan.token_mask().all()
    assert plan.density.tolist() == [[1.0]]
