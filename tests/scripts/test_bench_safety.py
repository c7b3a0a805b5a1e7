"""What trying a remainder changes: errors of heads without a remainder, with it, and tried."""

from __future__ import annotations

import pytest
import torch
from bench_safety import METHODS, Trials

from dit_sparse import LeastError, Site, TokenGrid, safe_remainder, sparse_attention
from tests.methods.layouts import smooth_inputs

GRID = TokenGrid(4, 16, 16)


def test_errors_are_those_of_each_head() -> None:
    q, k, v = smooth_inputs(GRID)
    trials, site = Trials([1], [0.25]), Site(GRID, step=1, num_steps=4, branch="cond")
    lse = torch.zeros(1, 2, GRID.num_tokens)
    for other in (Site(GRID, step=2, num_steps=4), Site(GRID, step=1, num_steps=4, branch="uncond")):
        trials.watch(other, q, k, v, lse)
    assert not trials.heads
    trials.watch(site, q, k, v, lse)
    rows = trials.rows()
    assert {(row["method"], row["remainder"]) for row in rows} == {
        (m, r) for m in METHODS for r in ("mean", "value", "mass")
    }
    dense = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1) @ v.double()
    plan = LeastError(0.25, early=1).plan(q, k, v, site, None).with_remainder("value")
    plans = plan.with_remainder("none"), plan, safe_remainder(q, k, v, plan)
    want = [
        (sparse_attention(q, k, v, own).double() - dense).norm(dim=(2, 3)) / dense.norm(dim=(2, 3)) for own in plans
    ]
    row = next(row for row in rows if (row["method"], row["remainder"]) == ("lea", "value"))
    assert row["heads"] == q.shape[1]
    assert row["largest error"] == pytest.approx([float(x.max()) for x in want], rel=1e-3)
    assert row["largest over none"] == pytest.approx([float((x / want[0]).max()) for x in want[1:]], rel=1e-3)
