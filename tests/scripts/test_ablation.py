"""The variants of least-error attention differ in the part that they are to differ in."""

from __future__ import annotations

import pytest
from ablation import ByHead, ByMass, ByMeanQuery, ByRow, cases, table

from dit_sparse import LeastError, Site
from tests.methods.layouts import DEMO, smooth_inputs


def test_cases_are_apart() -> None:
    found = cases()
    assert len({case.label for case in found}) == len({str(case.config) for case in found}) == len(found)
    assert all(case.schedule is not None and case.schedule.warmup == 0 for case in found)


def test_budgets_are_of_heads_and_rows() -> None:
    site, given = Site(DEMO), smooth_inputs(DEMO)
    whole, heads, rows = (cls(0.1).plan(*given, site, None) for cls in (LeastError, ByHead, ByRow))
    assert float(heads.density.mean()) == pytest.approx(float(whole.density.mean()), rel=0.02)
    by_head = [plan.block_mask.kv_counts.sum(-1)[0].float() for plan in (whole, heads)]
    assert by_head[1].std() < 2 < by_head[0].std()
    assert (rows.block_mask.kv_counts == rows.block_mask.kv_counts[0, 0, 0]).all()


def test_scores_are_others() -> None:
    site, given = Site(DEMO), smooth_inputs(DEMO)
    masks = [cls(0.1).plan(*given, site, None).block_mask.kept_blocks for cls in (LeastError, ByMass, ByMeanQuery)]
    shared = [float((masks[0] & other).sum() / masks[0].sum()) for other in masks[1:]]
    assert all(0.2 < share < 0.999 for share in shared), shared


def test_the_table_has_medians_and_ranges() -> None:
    rows = [{"label": "as it is; 0.125", "psnr": value} for value in (30.0, 40.0, 31.0)]
    text = table({"videos": [*rows, {"label": "dense", "psnr": None}, {"label": "as it is; 0.25", "psnr": 50.0}]})
    assert text.splitlines() == [
        "| | 0.25 | 0.125 | 0.0625 |",
        "|---|---|---|---|",
        "| as it is | 50.0 (50.0 to 50.0) | 31.0 (30.0 to 40.0) |  |",
    ]
