"""The recall benchmark against the whole attention map."""

from __future__ import annotations

import pytest
from bench_recall import Call, measure, merge_reports, methods_for, table

from dit_sparse import AdaSpa, Neighborhood, Oracle, PbsAttention, ProxyAttention, Site, TokenGrid
from dit_sparse.eval.floors import RandomBlocks
from dit_sparse.methods.parameters import without_density
from tests.methods.literal import random_qkv


def call_on(grid: TokenGrid) -> Call:
    q, k, v = random_qkv(grid, batch=1)
    return Call(Site(grid), q, k, v, (q @ k.transpose(-1, -2) / 4).logsumexp(-1))


def test_the_oracle_is_above_all_and_random_blocks_below() -> None:
    calls = [call_on(TokenGrid(2, 8, 8))]
    methods = (Oracle(0.25, block=8), AdaSpa(0.25, block=8), RandomBlocks(0.25, block=8))
    rows = [measure(method.name, method, 0.25, calls) for method in methods]
    assert rows[0].recall > rows[1].recall > rows[2].recall
    assert all(row.achieved == pytest.approx(0.25, rel=0.1) and row.worst <= row.recall for row in rows)
    assert table(rows).row_count == 3


def test_methods_are_named_with_their_parameters() -> None:
    made = methods_for(["dense", "adaspa", "seer", "proxy:groups=3+block=128"], None)
    assert made == {"adaspa": AdaSpa(), "proxy:groups=3+block=128": ProxyAttention(groups=3, block=128)}
    assert [*methods_for(["adaspa", "seer"], "gates")] == ["adaspa", "seer"]
    with pytest.raises(ValueError, match="did you mean 'groups'"):
        methods_for(["proxy:grups=3"], None)


def test_methods_measured_again_take_the_place_of_what_was_there() -> None:
    def report(commit: str, steps: int = 8, **recalls: float) -> dict:
        rows = [{"method": name, "density": d, "recall": x} for name, x in recalls.items() for d in (0.5, 0.25)]
        return {"environment": {"cpu": "a", "commit": commit}, "calls": ["c"], "steps": steps, "rows": rows}

    merged = merge_reports([report("1", paro=0.1, svg=0.2), report("2", svg=0.3)])
    assert merged["environment"] == {"cpu": "a", "commit": "1, 2"}
    assert {(row["method"], row["recall"]) for row in merged["rows"]} == {("paro", 0.1), ("svg", 0.3)}
    assert len(merged["rows"]) == 4
    with pytest.raises(ValueError, match="the steps of report 2 is not that of report 1"):
        merge_reports([report("1", svg=0.2), report("2", steps=4, svg=0.3)])


def test_a_threshold_of_its_own_is_measured_where_there_is_one() -> None:
    assert without_density(AdaSpa()) is None
    assert without_density(Neighborhood(window=2)) is None
    free = without_density(PbsAttention(0.25, threshold=0.5, block=8, segment=16))
    assert free == PbsAttention(None, threshold=0.5, block=8, segment=16)
    row = measure("pbs", free, None, [call_on(TokenGrid(2, 8, 8))])
    assert row.density is None
    assert 0 < row.achieved < 1
