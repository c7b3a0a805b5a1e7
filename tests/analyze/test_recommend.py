"""What is recommended, on made-up measurements."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dit_sparse import AdaSpa, Oracle, Schedule, SparseVideoGen
from dit_sparse.analyze import Candidate, Measured, recommend, summaries

CANDIDATES = [
    Candidate("adaspa", AdaSpa(0.5), 0.5),
    Candidate("adaspa", AdaSpa(0.25), 0.25),
    Candidate("svg", SparseVideoGen(0.5), 0.5),
    Candidate("oracle", Oracle(0.25), 0.25),
]


def rows(label: str, recall: float, time: float | None, *, layer_recall=None, reused=None) -> list[Measured]:
    """Two layers at three steps of ten; `layer_recall` is of the second layer, `reused` of the last two steps."""
    own = [recall, recall if layer_recall is None else layer_recall]
    stale = {2: None, 5: 1.0, 8: 1.0} if reused is None else {2: None, 5: reused[0], 8: reused[1]}
    return [
        Measured(
            label, "transformer", layer, step, 0.25, (own[layer], own[layer] - 0.02), (0.1, 0.2), stale[step], time
        )
        for step in (2, 5, 8)
        for layer in (0, 1)
    ]


def test_the_fastest_that_recalls_enough() -> None:
    measured = [
        *rows("adaspa 0.5", 0.96, 0.6),
        *rows("adaspa 0.25", 0.93, 0.35),
        *rows("svg 0.5", 0.85, 0.2),
        *rows("oracle 0.25", 0.99, 0.1),
    ]
    chosen = recommend(CANDIDATES, measured, 0.9, 10)
    assert (chosen.label, chosen.reached) == ("adaspa 0.25", True)
    assert chosen.schedule == Schedule(AdaSpa(0.25), refresh=())
    assert "2 of 3 that are faster than dense reach 0.9" in chosen.reasons[0]
    assert Schedule.from_config(chosen.schedule.to_config()) == chosen.schedule


def test_none_recalls_enough() -> None:
    chosen = recommend(CANDIDATES, rows("adaspa 0.25", 0.8, 0.35) + rows("svg 0.5", 0.7, 0.2), 0.9, 10)
    assert (chosen.label, chosen.reached) == ("adaspa 0.25", False)
    assert any("none reaches 0.9" in reason for reason in chosen.reasons)


def test_where_none_recalls_enough_the_one_that_errs_least_is_chosen() -> None:
    precise = [replace(row, error=(0.02, 0.03)) for row in rows("svg 0.5", 0.6, 0.3)]
    chosen = recommend(CANDIDATES, rows("adaspa 0.25", 0.8, 0.35) + precise, 0.9, 10)
    assert (chosen.label, chosen.reached) == ("svg 0.5", False)
    assert "errs least, by 0.025" in chosen.reasons[1]


@pytest.mark.parametrize("time", [1.2, None])
def test_nothing_is_faster(time) -> None:
    chosen = recommend(CANDIDATES, rows("adaspa 0.25", 0.99, time) + rows("oracle 0.25", 0.99, 0.1), 0.9, 10)
    assert (chosen.schedule.method.name, chosen.label, chosen.reached) == ("dense", "", False)


def test_a_layer_that_recalls_far_less_runs_dense() -> None:
    assert recommend(CANDIDATES, rows("adaspa 0.5", 0.99, 0.5, layer_recall=0.82), 0.9, 10).schedule.dense_layers == ()
    chosen = recommend(CANDIDATES, rows("adaspa 0.5", 0.99, 0.5, layer_recall=0.78), 0.89, 10)
    assert chosen.schedule.dense_layers == (1,)


def test_plans_are_made_anew_where_they_are_stale() -> None:
    chosen = recommend(CANDIDATES, rows("adaspa 0.5", 0.99, 0.5, reused=(0.97, 0.9)), 0.9, 10)
    assert chosen.schedule.refresh == (0.8,)
    own = recommend(CANDIDATES, rows("svg 0.5", 0.99, 0.5, reused=(0.9, 0.9)), 0.9, 10)
    assert own.schedule.refresh is None, "it plans at every step anyway"


def test_summaries() -> None:
    first, second = summaries(rows("svg 0.5", 0.7, 0.2, reused=(0.9, 0.8)) + rows("adaspa 0.5", 0.9, None))
    assert (first.label, second.label) == ("adaspa 0.5", "svg 0.5")
    assert (second.recall, second.worst, second.error) == pytest.approx((0.69, 0.68, 0.15))
    assert (first.time, second.time, second.reused) == (None, pytest.approx(0.2), 0.8)


def test_a_bad_target() -> None:
    with pytest.raises(ValueError, match="target must be above 0 and at most 1, got 2"):
        recommend(CANDIDATES, rows("adaspa 0.5", 0.9, 0.5), 2, 10)
