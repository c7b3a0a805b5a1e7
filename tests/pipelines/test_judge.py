"""Sparse attention that would not be faster runs dense, by decision, and says so."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    LeastError,
    Neighborhood,
    Pisa,
    Schedule,
    SolAttention,
    SpargeAttention,
    sparsify,
    statistics,
)
from dit_sparse.cost import TABLE_VARIABLE
from dit_sparse.pipelines import NotSparseError
from dit_sparse.pipelines.judge import NOT_FASTER
from tests.kernels.test_block_mass import needs_interpreter

SPARSE = AdaSpa(density=0.5, block=16)


@pytest.fixture
def own_table(monkeypatch) -> None:
    """The package's own table, as for users."""
    monkeypatch.delenv(TABLE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")


@pytest.fixture
def costs(monkeypatch, tmp_path):
    """Writes a table for the CPU."""

    def write(backend: str = "gather", **changes) -> None:
        entry = json.loads(Path("tests/costs.json").read_text())["cpu"]
        kernel = entry["backends"]["gather"] | {"kernel": {"1": 1.0}}
        entry |= {key: value for key, value in changes.items() if key in entry}
        entry["backends"] = {backend: kernel | {key: value for key, value in changes.items() if key in kernel}}
        path = tmp_path / f"costs-{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"cpu": entry}))
        monkeypatch.setenv(TABLE_VARIABLE, str(path))

    return write


def test_a_short_sequence_runs_dense_by_decision_and_says_so(pipe, render, own_table) -> None:
    dense = render(pipe)
    sparsify(pipe, SPARSE)
    with pytest.warns(UserWarning, match=r"layer 0 runs dense.*adaspa would take .* of its 288 tokens") as caught:
        got = render(pipe)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        render(pipe)
    assert torch.equal(got, dense)
    run = statistics(pipe)
    assert run.dense_calls == {"warm-up": 4, NOT_FASTER: 16}
    assert run.plan_seconds == 0, "it was known before planning"
    assert all(record.predicted > 1 for record in run.records if record.reason == NOT_FASTER)
    assert min(run.receipts()["transformer"]["predicted"]) > 1


def test_never_slower_off_runs_it_sparse(pipe, render, own_table) -> None:
    render(sparsify(pipe, Schedule(SPARSE, never_slower=False)))
    assert statistics(pipe).dense_calls == {"warm-up": 4}


def test_one_block_is_a_decision_too_and_no_error(pipe, render, own_table) -> None:
    method = replace(SPARSE, block=512)
    with pytest.warns(UserWarning, match="runs dense"):
        render(sparsify(pipe, method))
    with pytest.raises(NotSparseError):
        render(sparsify(pipe, Schedule(method, never_slower=False)))


@pytest.mark.parametrize(
    ("changes", "is_dense"),
    [({}, False), ({"kernel": {"1": 1.9}}, False), ({"kernel": {"1": 2.1}}, True), ({"call": 1.0}, True)],
)
def test_the_density_decides_with_the_kernel(pipe, render, costs, recwarn, changes, is_dense) -> None:
    """At density 0.5."""
    costs(**changes)
    render(sparsify(pipe, SPARSE))
    assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense
    assert bool(len(recwarn)) is is_dense


@pytest.mark.parametrize(("cost", "is_dense"), [(1.9, False), (2.1, True)])
def test_a_plan_counts_by_the_calls_that_it_serves(pipe, render, costs, recwarn, cost, is_dense) -> None:
    """Five steps, of which one is dense; two plans for four calls: half a plan a call, beside density 0.5... of 1.0."""
    costs(plans={"adaspa": [cost / 2, 0]}, kernel={"1": 1.0})
    render(sparsify(pipe, SPARSE))
    assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense


@pytest.mark.parametrize(
    ("cost", "scale", "is_dense"), [(1.7, 3.0, False), (2.1, 3.0, True), (0.9, 1.0, False), (1.1, 1.0, True)]
)
def test_a_plan_that_guidance_branches_share_counts_half(pipe, render, costs, recwarn, cost, scale, is_dense) -> None:
    """Five plans of five steps: one a call, and half a plan where two forwards share it, beside density 0.5 of 1.0."""
    method = LeastError(density=0.5, early=1, tile=(1, 2, 4))
    costs(plans={"lea": [cost / 2, 0]}, kernel={"1": 1.0})
    render(sparsify(pipe, Schedule(method, warmup=0, refresh=(1, 2, 3, 4), remainder="none")), guidance_scale=scale)
    assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense


@pytest.mark.parametrize(
    ("remainder", "is_dense"), [("method", True), ("value", True), ("mean", False), ("none", False)]
)
def test_a_methods_own_remainder_counts_before_it_plans(pipe, render, costs, recwarn, remainder, is_dense) -> None:
    """PISA's is "value"."""
    costs(remainder={"mean": 0.01, "value": 10.0})
    render(sparsify(pipe, Schedule(Pisa(density=0.5, block=16), remainder=remainder)))
    assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense
    assert (statistics(pipe).plan_seconds == 0) is is_dense


def test_a_method_without_a_density_is_judged_by_its_first_plan(pipe, render, costs, recwarn) -> None:
    costs(kernel={"1": 1.0}, call=1e-9)
    method = SpargeAttention(density=None, block_q=16, block_k=8)
    render(sparsify(pipe, Schedule(method, warmup=0)))
    kept = statistics(pipe)
    costs(kernel={"1": 1000.0})
    render(sparsify(pipe, Schedule(method, warmup=0)))
    run = statistics(pipe)
    assert run.dense_calls == {NOT_FASTER: run.calls}
    planned = [record for record in run.records if record.planning is not None]
    assert {record.step for record in planned} == {0}, "and not asked again"
    assert kept.calls == run.calls


def test_a_density_that_falls_over_the_run_is_judged_step_by_step(pipe, render, costs) -> None:
    """Dense while it is high, and no warning: it pays later."""
    costs(kernel={"1": 3.0})
    method = LeastError(density=0.3, tile=(1, 4, 4), rows=4)
    pays = [3 * density <= 1 for density in method.step_densities(10)]
    assert pays[0] is False
    assert pays[-1] is True
    render(sparsify(pipe, Schedule(method, warmup=0)), steps=10)
    dense = {record.step for record in statistics(pipe).records if record.reason == NOT_FASTER}
    assert dense == {step for step, pay in enumerate(pays) if not pay}


def test_an_error_that_rises_over_the_run_is_judged_part_by_part(pipe, render, costs, recwarn) -> None:
    """The verdict on the first steps, which keep more, does not stand for the others."""
    costs(kernel={"1": 1.0}, call=1e-9)
    schedule = Schedule(LeastError(error=0.1, early=100, tile=(1, 2, 4), rows=8), warmup=0)
    render(sparsify(pipe, schedule), steps=10)
    kept = {record.step: float(record.density.mean()) for record in statistics(pipe).records if record.layer == 0}
    assert kept[0] > 1.2 * kept[9]
    costs(kernel={"1": 2 / (kept[0] + kept[9])}, call=1e-9)
    render(sparsify(pipe, schedule), steps=10)
    reasons = {record.step: record.reason for record in statistics(pipe).records if record.layer == 0}
    assert (reasons[0], reasons[9]) == (NOT_FASTER, "")


@pytest.mark.parametrize(("cost", "is_dense"), [(1.1, False), (1.3, True)])
def test_a_methods_own_remainder_counts(pipe, render, costs, recwarn, cost, is_dense) -> None:
    """Blocks of 16: four times what it costs with 64."""
    costs(kernel={"1": 1.0}, remainder={"none": 0.0, "value": cost / 8})
    render(sparsify(pipe, Pisa(density=0.4, block=16)))
    assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense


@needs_interpreter
def test_blocks_routed_in_the_kernel_cost_what_its_kernel_does(pipe, render, costs, recwarn) -> None:
    """Whatever other backends would take."""
    schedule = Schedule(SolAttention(block=64, in_kernel=True), warmup=0)
    # The first call of a layer is judged when it is made.
    for cost, steps, is_dense in ((1.0, 1, False), (1000.0, 2, True)):
        costs(backend="triton", kernel={"1": cost}, call=1e-9, remainder={})
        render(sparsify(pipe, schedule), steps=steps, guidance_scale=1.0)
        assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense


def test_a_static_plan_is_judged_once(pipe, render, costs, recwarn, monkeypatch) -> None:
    """Also over several runs."""
    made = []
    plan = Neighborhood.plan
    monkeypatch.setattr(Neighborhood, "plan", lambda self, *args: made.append(1) or plan(self, *args))
    costs(kernel={"1": 1000.0})
    sparsify(pipe, Neighborhood(window=(1, 5, 7), tile=(1, 4, 4)))
    for _ in range(2):
        render(pipe)
    assert len(made) == 1
    assert statistics(pipe).dense_calls == {"warm-up": 4, NOT_FASTER: 16}


def test_blocks_that_are_cut_cost_what_the_table_says(pipe, render, costs, recwarn) -> None:
    method = Neighborhood(window=(1, 5, 7), tile=(1, 4, 4))
    for partial, is_dense in ((1.0, False), (100.0, True)):
        costs(partial=partial)
        render(sparsify(pipe, method))
        assert (NOT_FASTER in statistics(pipe).dense_calls) is is_dense


def test_a_backend_that_nobody_measured_runs_when_asked_for(pipe, render, costs) -> None:
    costs(kernel={"1": 1000.0})
    render(sparsify(pipe, SPARSE, backend="reference"))
    assert statistics(pipe).dense_calls == {"warm-up": 4}


def test_a_table_that_cannot_be_read_is_an_error(pipe, render, monkeypatch, tmp_path) -> None:
    for text in ("no JSON", "[]", '{"cpu": {}}', '{"cpu": 3}'):
        path = tmp_path / f"{len(text)}.json"
        path.write_text(text)
        monkeypatch.setenv(TABLE_VARIABLE, str(path))
        with pytest.raises(ValueError, match=r"cost table .* cannot be used: .*doctor --measure"):
            sparsify(pipe, SPARSE)
