"""The benchmark of skipped blocks skips the share that it says, and compares with dense attention."""

from __future__ import annotations

import bench_skip
import pytest
import torch


def test_shares_are_met_and_the_output_stays_dense_attentions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_skip, "HEADS", 2)
    with torch.no_grad():
        rows = bench_skip.measure(500, [50], [0.0, 0.5, 0.9], torch.device("cpu"), 1)
    assert [row.kernel for row in rows] == ["dense", "gather", *(f"gather, skipping {s}" for s in ("0", "0.5", "0.9"))]
    assert [row.skipped for row in rows] == pytest.approx([0, 0, 0, 0.5, 0.9], abs=0.1)
    assert all(row.ms > 0 and row.relative_error < 1e-5 for row in rows)
    assert rows[0].over_dense == 1
    assert len(bench_skip.table(rows).rows) == 5
