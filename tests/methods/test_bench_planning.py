"""The planning benchmark times what it says."""

from __future__ import annotations

import pytest
from bench_planning import measure

from dit_sparse import TokenGrid


def test_dynamic_methods_cost_less_than_the_oracle_and_static_ones_once() -> None:
    rows = {row.method: row for row in measure(["oracle", "minference", "strided", "seer"], 1, TokenGrid(2, 16, 16))}
    assert rows["strided"].static
    assert not rows["oracle"].static
    assert all(row.plan_ms > 0 and row.density == pytest.approx(0.25, rel=0.1) for row in rows.values())
    for row in rows.values():
        assert row.share_of_dense == pytest.approx(row.plan_ms / row.dense_ms)
