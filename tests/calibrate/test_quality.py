"""Densities for a wanted quality, against errors and videos computed anew."""

from __future__ import annotations

import math

import pytest
import torch

from dit_sparse import LeastError, Neighborhood, Paro, Schedule, sparse_attention, sparsify, unsparsify
from dit_sparse.calibrate import for_error, for_psnr
from dit_sparse.calibrate.quality import planned_steps
from dit_sparse.eval.fidelity import psnr
from dit_sparse.methods.parameters import with_density
from dit_sparse.pipelines import observe_values
from tests.calibrate.test_calibrate import ARGUMENTS

SCHEDULE = Schedule(LeastError(tile=(1, 4, 4), rows=4), warmup=0)
DENSITIES = (0.2, 0.35, 0.6)
PROMPTS = ["a red ball"]


def errors_of(pipe, schedule: Schedule, density: float) -> list[float]:
    """Relative error of every layer at the planned steps of a dense run."""
    sums: dict[int, list[float]] = {}

    def watch(site, q, k, v, lse) -> None:
        if site.step in planned_steps(schedule, site.num_steps):
            plan = with_density(schedule.method, density).plan(q, k, v, site, None)
            dense = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1) @ v
            own = sums.setdefault(site.layer, [0.0, 0.0])
            own[0] += float((sparse_attention(q, k, v, plan) - dense).square().sum())
            own[1] += float(dense.square().sum())

    with observe_values(pipe, watch):
        pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="latent", **ARGUMENTS)
    return [math.sqrt(error / whole) for _, (error, whole) in sorted(sums.items())]


def test_each_layer_gets_the_least_density_that_errs_little_enough(pipe) -> None:
    errors = {density: errors_of(pipe, SCHEDULE, density) for density in DENSITIES}
    # Between the layers' errors at the middle density, so that they come out differently.
    target = sum(sorted(errors[0.35])[:2]) / 2
    found = for_error(pipe, PROMPTS, SCHEDULE, target, densities=DENSITIES, **ARGUMENTS)
    for density in DENSITIES:
        assert found.measured[density] == pytest.approx(errors[density], rel=1e-3)
    want = [next((d for d in DENSITIES if errors[d][n] <= target), None) for n in range(len(errors[0.2]))]
    assert len(set(want)) > 1
    assert found.schedule.layer_densities == tuple(1.0 if d is None else d for d in want)
    assert found.schedule.dense_layers == tuple(n for n, d in enumerate(want) if d is None)


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


@pytest.mark.parametrize(
    ("make", "target", "schedule", "message"),
    [
        (for_error, 0.0, SCHEDULE, "error must be above 0"),
        (for_error, 1e-9, SCHEDULE, "some layer reaches"),
        (for_psnr, float("nan"), SCHEDULE, "psnr must be a number"),
        (for_psnr, 99.9, SCHEDULE, "psnr must be one that density 0.2 reaches"),
        (for_error, 0.1, Schedule(Paro(plan_file="x"), warmup=0), "method must be one with a density"),
        (for_psnr, 30.0, Schedule(Neighborhood(window=3), warmup=0), "method must be one with a density"),
    ],
)
def test_names_what_does_not_fit(pipe, make, target, schedule, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(pipe, PROMPTS, schedule, target, densities=(0.2,), **ARGUMENTS)
    with pytest.raises(ValueError, match="prompts must be a list"):
        make(pipe, "a red ball", schedule, target, **ARGUMENTS)
