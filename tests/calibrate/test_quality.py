"""Densities for a wanted quality, against errors and videos computed anew."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_sparse import (
    AdaSpa,
    LeastError,
    Neighborhood,
    Paro,
    Pisa,
    Schedule,
    Site,
    sparse_attention,
    sparsify,
    unsparsify,
)
from dit_sparse.calibrate import for_error, for_psnr
from dit_sparse.calibrate.quality import BASE, _threshold
from dit_sparse.cost import TABLE_VARIABLE
from dit_sparse.eval.fidelity import psnr
from dit_sparse.methods.parameters import with_density, with_threshold
from dit_sparse.pipelines import observe_values
from dit_sparse.types import AttentionPlan, Method
from tests.calibrate.test_calibrate import ARGUMENTS as OF_CALIBRATION

SCHEDULE = Schedule(Pisa(block=4), warmup=0)
BY_ERROR = Schedule(LeastError(tile=(1, 2, 2), rows=4), warmup=0)
DENSITIES = (0.2, 0.35, 0.6)
PROMPTS = ["a red ball"]
ARGUMENTS = {**OF_CALIBRATION, "num_inference_steps": 3}


@pytest.fixture
def own_costs(monkeypatch) -> None:
    """The package's own table, by which nothing is faster than dense attention in a tiny model."""
    monkeypatch.delenv(TABLE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")


def errors_of(pipe, schedule: Schedule, method_of: Callable[[Site], Method]) -> list[float]:
    """Relative error of every layer over a dense run that would plan at each step, against attention in float64."""
    sums: dict[int, list[float]] = {}
    plans: dict[Any, AttentionPlan] = {}

    def watch(site, q, k, v, lse) -> None:
        # Both branches of a sample may have one plan, that of the first.
        key = site.step, site.layer, *([site.branch] if schedule.method.scope == "call" else [])
        plan = plans[key] = plans.get(key) or method_of(site).plan(q, k, v, site, None)
        q, k, v = (x.double() for x in (q, k, v))
        dense = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
        own = sums.setdefault(site.layer, [0.0, 0.0])
        own[0] += float((sparse_attention(q, k, v, plan) - dense).square().sum())
        own[1] += float(dense.square().sum())

    with observe_values(pipe, watch):
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **ARGUMENTS)
    return [math.sqrt(error / whole) for _, (error, whole) in sorted(sums.items())]


def test_each_layer_gets_the_least_density_that_errs_little_enough(pipe) -> None:
    methods = {density: with_density(SCHEDULE.method, density) for density in DENSITIES}
    errors = {density: errors_of(pipe, SCHEDULE, lambda site, own=own: own) for density, own in methods.items()}
    # Between the layers' errors at the middle density, so that they come out differently.
    target = sum(sorted(errors[0.35])[:2]) / 2
    found = for_error(pipe, PROMPTS, SCHEDULE, target, densities=DENSITIES, **ARGUMENTS)
    for density in DENSITIES:
        assert found.measured[density] == pytest.approx(errors[density], rel=1e-3)
    want = [next((d for d in DENSITIES if errors[d][n] <= target), None) for n in range(len(errors[0.2]))]
    assert len(set(want)) > 1
    assert found.schedule.layer_densities == tuple(1.0 if d is None else d for d in want)
    assert found.schedule.dense_layers == tuple(n for n, d in enumerate(want) if d is None)


def test_each_layer_gets_the_threshold_with_which_it_errs_as_much_as_is_wanted(pipe) -> None:
    thresholds = (0.01, 0.03, 0.1)
    wanted = 0.05
    found = for_error(pipe, PROMPTS, BY_ERROR, wanted, thresholds=thresholds, **ARGUMENTS)
    chosen = found.schedule.layer_thresholds
    assert found.varied == "threshold"
    assert chosen is not None
    assert len(set(chosen)) > 1
    assert found.schedule.layer_densities is None
    assert found.schedule.dense_layers == ()
    errors = errors_of(pipe, BY_ERROR, found.schedule.method_for)
    assert errors == pytest.approx([wanted] * len(chosen), rel=0.2)
    measured = errors_of(pipe, BY_ERROR, lambda site: with_threshold(BY_ERROR.method, 0.03))
    assert found.measured[0.03] == pytest.approx(measured, rel=1e-3)
    assert all(a > b for a, b in zip(found.kept[0.01], found.kept[0.1], strict=True))
    assert Schedule.from_config(found.schedule.to_config()) == found.schedule


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        (Schedule(AdaSpa(block=4), warmup=0), {1, 2}),  # the first gives the row sums
        (Schedule(AdaSpa(block=4), warmup=0.25, refresh=(2, 3)), {1, 2, 3}),
        (Schedule(LeastError(tile=(1, 2, 2), rows=4), warmup=0, refresh=(3,)), {0, 1, 3}),  # its density falls at 1
        (Schedule(Neighborhood(density=0.5), warmup=0.25), {1}),
    ],
    ids=["adaspa", "refresh", "lea", "neighborhood"],
)
def test_errors_are_measured_where_a_run_plans(pipe, monkeypatch, schedule: Schedule, want: set[int]) -> None:
    schedule, kind, steps = replace(schedule, never_slower=False), type(schedule.method), set()
    name = "plan_from" if kind is LeastError else "plan"
    make = getattr(kind, name)

    def record(*given: Any) -> AttentionPlan:
        steps.update(at.step for at in given if isinstance(at, Site))
        return make(*given)

    monkeypatch.setattr(kind, name, record)
    arguments = {**ARGUMENTS, "num_inference_steps": 4}
    for_error(pipe, PROMPTS, schedule, 0.9, densities=(0.5,), thresholds=(0.02,), **arguments)
    assert steps == want
    steps.clear()
    sparsify(pipe, schedule)
    pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **arguments)
    unsparsify(pipe)
    assert steps == want


def test_prompts_share_no_plan(pipe) -> None:
    one_step = {**ARGUMENTS, "num_inference_steps": 1}
    apart = [for_error(pipe, [prompt], BY_ERROR, 0.05, thresholds=(0.02,), **one_step) for prompt in ("a", "a ball")]
    both = for_error(pipe, ["a", "a ball"], BY_ERROR, 0.05, thresholds=(0.02,), **one_step)
    kept = zip(*(found.kept[0.02] for found in apart), strict=True)
    assert both.kept[0.02] == pytest.approx([sum(pair) / 2 for pair in kept])
    assert apart[0].kept != apart[1].kept


@pytest.mark.parametrize(
    ("errors", "wanted", "want"),
    [
        ((0.1, 0.2, 0.4), 0.2, 2.0),
        ((0.1, 0.2, 0.4), 0.3, 2.0 * 1.5),
        ((0.1, 0.1, 0.4), 0.2, 2.0 * 2**0.5),
        ((0.1, 0.2, 0.4), 0.5, 4.0),
        ((0.1, 0.2, 0.4), 0.05, None),
        ((0.0, 0.2, 0.4), 0.1, 1.0),
    ],
)
def test_thresholds_are_interpolated(errors, wanted, want) -> None:
    # 0.3 lies log2(1.5) of the way from 0.2 to 0.4, and 2 * 2**log2(1.5) is 3.
    assert _threshold((1.0, 2.0, 4.0), errors, wanted) == (want if want is None else pytest.approx(want))


def test_thresholds_are_scaled_until_a_prompt_falls_short(pipe) -> None:
    factors = (0.5, 2.0)
    quiet = {"thresholds": (0.02, 0.1), "factors": factors}
    base = for_error(pipe, PROMPTS, BY_ERROR, BASE, thresholds=quiet["thresholds"], **ARGUMENTS).schedule

    def video(schedule: Schedule | None):
        if schedule is not None:
            sparsify(pipe, schedule)
        made = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **ARGUMENTS).frames[0]
        unsparsify(pipe)
        return made.clip(0, 1)

    scaled = [tuple(factor * value for value in base.layer_thresholds) for factor in factors]
    dense = video(None)
    values = [psnr(video(replace(base, layer_thresholds=own)), dense) for own in scaled]
    assert values[0] > values[1]
    found = for_psnr(pipe, PROMPTS, BY_ERROR, sum(values) / 2, **quiet, **ARGUMENTS)
    assert found.varied == "factor"
    assert found.schedule.layer_thresholds == pytest.approx(scaled[0])
    assert [found.measured[factor][0] for factor in factors] == pytest.approx(values, abs=0.01)


def test_the_density_is_the_least_that_every_prompt_reaches(pipe) -> None:
    def frames(schedule: Schedule | None):
        if schedule is not None:
            sparsify(pipe, schedule)
        made = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="np", **ARGUMENTS).frames[0]
        unsparsify(pipe)
        return made.clip(0, 1)

    dense = frames(None)
    values = [psnr(frames(Schedule(with_density(SCHEDULE.method, d), warmup=0)), dense) for d in DENSITIES]
    target = (values[0] + values[1]) / 2
    assert values[0] < target < values[2]
    found = for_psnr(pipe, PROMPTS, SCHEDULE, target, densities=DENSITIES, **ARGUMENTS)
    assert found.schedule.method.density == 0.35
    assert [found.measured[d][0] for d in DENSITIES] == pytest.approx(values, abs=0.01)


def test_psnr_is_measured_sparse_where_the_cost_model_would_have_it_dense(pipe, own_costs) -> None:
    quiet = {"densities": (0.2, 0.6), **ARGUMENTS}
    want = for_psnr(pipe, PROMPTS, replace(SCHEDULE, never_slower=False), 1.0, **quiet)
    target = sum(own[0] for own in want.measured.values()) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing runs dense
        found = for_psnr(pipe, PROMPTS, SCHEDULE, target, **quiet)
    assert SCHEDULE.never_slower
    assert found.measured == want.measured
    assert found.schedule == replace(SCHEDULE, method=with_density(SCHEDULE.method, 0.6))


@pytest.mark.parametrize(
    ("make", "target", "schedule", "message"),
    [
        (for_error, 0.0, SCHEDULE, "error must be above 0"),
        (for_error, 1e-9, SCHEDULE, "some layer reaches"),
        (for_psnr, float("nan"), SCHEDULE, "psnr must be a number"),
        (for_psnr, 99.9, SCHEDULE, "psnr must be one that density 0.2 reaches"),
        (for_error, 1e-9, BY_ERROR, "some layer reaches"),
        (for_error, 0.1, replace(SCHEDULE, warmup=1.0), "schedule must leave a step sparse, got a warm-up of 1"),
        (for_error, 0.1, Schedule(Paro(plan_file="x"), warmup=0), "method must be one with a density or an error"),
        (for_psnr, 30.0, Schedule(Neighborhood(window=3), warmup=0), "method must be one with a density or an error"),
        (for_psnr, 30.0, replace(SCHEDULE, ramp=(0.5, 0.2)), "ramp must be none where a quality decides"),
        (for_error, 0.1, replace(SCHEDULE, layer_densities=(0.5,)), "layer_densities must be none"),
    ],
)
def test_names_what_does_not_fit(pipe, make, target, schedule, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(pipe, PROMPTS, schedule, target, densities=(0.2,), thresholds=(0.02,), **ARGUMENTS)
    with pytest.raises(ValueError, match="prompts must be a list"):
        make(pipe, "a red ball", schedule, target, **ARGUMENTS)
