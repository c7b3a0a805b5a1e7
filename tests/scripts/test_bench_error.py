"""What is reckoned and what is measured of lea's error."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from bench_error import THRESHOLDS, Errors, table

from dit_sparse import LeastError, Site, TokenGrid, sparse_attention
from tests.methods.layouts import smooth_inputs

GRID = TokenGrid(4, 16, 16)


def test_reckoned_is_the_bound_and_measured_the_error() -> None:
    q, k, v = smooth_inputs(GRID)
    errors, site = Errors({3}), Site(GRID, step=3, num_steps=4, branch="cond")
    lse = torch.zeros(1, 2, GRID.num_tokens)
    for other in (Site(GRID, step=2, num_steps=4), Site(GRID, step=3, num_steps=4, branch="uncond")):
        errors(other, q, k, v, lse)
    assert errors.rows == []
    errors(site, q, k, v, lse)
    assert [row.threshold for row in errors.rows] == list(THRESHOLDS)
    assert all(row.reckoned <= row.threshold * (1 + 1e-4) for row in errors.rows)
    assert errors.rows[-1].reckoned > 0
    assert all(a.density >= b.density for a, b in pairwise(errors.rows))
    dense = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).softmax(-1) @ v.double()
    for row in errors.rows:
        plan = LeastError(error=row.threshold, early=1).plan(q, k, v, site, None)
        for kind in ("mean", "value"):
            wrong = sparse_attention(q, k, v, plan.with_remainder(kind)).double() - dense
            assert getattr(row, kind) == pytest.approx(float(wrong.norm() / dense.norm()), rel=1e-3, abs=1e-6)


def test_the_table_has_medians_and_ranges() -> None:
    row = {"layer": 0, "threshold": 0.01, "reckoned": 0.01, "value": 0.02, "mean": 0.03, "density": 0.4}
    rows = [{**row, "threshold": t, "layer": n} for t in THRESHOLDS for n in (0, 1)] + [{**row, "value": 0.04}]
    rows.append({**row, "reckoned": 0.0, "value": 0.0, "density": 1.0})  # nothing to compare
    lines = table(rows).splitlines()
    assert lines[2] == f"| layer 0 | 2 (2 to 2) | 3 (2 to 4) | {' | '.join(['2 (2 to 2)'] * 3)} |"
    assert lines[4].startswith("| all layers | 2 (2 to 2) | 2 (2 to 4) |")
    assert [line.split(" |")[0] for line in lines[5:]] == ["| with `mean`", "| error", "| density"]
