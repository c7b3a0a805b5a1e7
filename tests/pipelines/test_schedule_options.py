"""Refresh by drift, and densities by noise level, by layer and by the change of the velocity, in runs of pipelines."""

from __future__ import annotations

from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, FlowMatchEulerDiscreteScheduler

from dit_sparse import BigBird, Dhsa, LeastError, Pisa, Schedule, Site, sparsify, statistics, unsparsify, velocity_ramp
from dit_sparse.pipelines import session as session_module
from dit_sparse.pipelines import session_of
from dit_sparse.pipelines.drift import DriftMeter
from dit_sparse.pipelines.families import adapter_for
from dit_sparse.pipelines.velocity import spread_density, velocity_changes
from tests.pipelines.composed import ALL_DENSE
from tests.pipelines.families import FAMILIES, Family

METHOD = Dhsa(density=0.5, tile=(1, 4, 4))


def plans_by_branch(pipe: Any) -> Counter[str]:
    return Counter(record.branch for record in statistics(pipe).records if record.planning is not None)


def density_by(pipe: Any, name: str) -> list[float]:
    found = defaultdict(list)
    for record in statistics(pipe).records:
        found[getattr(record, name)].append(float(record.density.mean()))
    return [sum(found[key]) / len(found[key]) for key in sorted(found)]


def test_the_meter_reads_what_moved_as_a_share() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, q2, k2 = torch.randn(4, 2, 3, 10, 4, generator=generator)
    meter = DriftMeter(q, k)
    assert meter.read() is None
    meter.measure(q2, k2)
    moved = sum((a.mean(2) - b.mean(2)).abs().sum() for a, b in ((q2, q), (k2, k)))
    assert meter.read() == pytest.approx(float(moved / sum(x.mean(2).abs().sum() for x in (q, k))))
    meter.measure(q, k)
    assert meter.read() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("drift", "plans"), [(0.0, 4), (1e9, 1)])
def test_plans_are_made_anew_where_queries_and_keys_move(pipe, render, drift: float, plans: int) -> None:
    """What moved at one step is taken up at the next, so without a bound it is every second step."""
    render(sparsify(pipe, Schedule(METHOD, warmup=0, drift=drift)), steps=7)
    assert plans_by_branch(pipe) == {"cond": 2 * plans, "uncond": 2 * plans}


def test_branches_never_share_a_drift(pipe, render, monkeypatch) -> None:
    """A branch that moves plans anew; the other, and other layers, do not."""
    session = session_of(sparsify(pipe, Schedule(METHOD, warmup=0, drift=0.5)))

    class Restless(DriftMeter):
        def __init__(self, *tensors: torch.Tensor) -> None:
            super().__init__(*tensors)
            self.moves = session._forward.branch == "uncond"

        def read(self) -> float | None:
            return super().read() and (1.0 if self.moves else 0.0)

    monkeypatch.setattr(session_module, "DriftMeter", Restless)
    render(pipe, steps=5)
    assert plans_by_branch(pipe) == {"cond": 2, "uncond": 6}
    assert len(session._drifts) == 4


def test_a_run_starts_without_the_drifts_of_the_last(pipe, render) -> None:
    sparsify(pipe, Schedule(METHOD, warmup=0, drift=0.0))
    first = render(pipe, steps=3)
    assert torch.equal(render(pipe, steps=3), first)
    assert plans_by_branch(pipe) == {"cond": 4, "uncond": 4}


def test_a_plan_that_branches_share_drifts_with_the_branch_that_made_it(pipe, render, monkeypatch) -> None:
    looked = []
    monkeypatch.setattr(DriftMeter, "measure", lambda meter, q, k: looked.append(meter.branch))
    session = session_of(sparsify(pipe, Schedule(LeastError(tile=(1, 2, 2)), warmup=0, drift=0.5)))
    render(pipe, steps=4)
    assert {meter.branch for meter in session._drifts.values()} == {"cond"}
    assert set(looked) == {"cond"}
    monkeypatch.undo()
    counts = {}
    for drift in (0.0, 1e9):
        render(sparsify(pipe, Schedule(LeastError(tile=(1, 2, 2)), warmup=0, drift=drift)), steps=12)
        counts[drift] = plans_by_branch(pipe)
    assert not counts[0.0]["uncond"]
    assert counts[0.0]["cond"] > counts[1e9]["cond"] > 0


def test_a_static_method_has_few_densities_by_noise(pipe, render) -> None:
    schedule = Schedule(BigBird(density=0.5, block=16), warmup=0, noise_densities=(0.9, 0.3))
    render(sparsify(pipe, schedule), steps=9)
    densities = density_by(pipe, "step")
    assert len(set(densities)) > 2
    assert densities == sorted(densities, reverse=True)
    assert len(session_of(pipe).previous) <= 9


def test_density_falls_with_the_noise_in_every_family(family: Family) -> None:
    pipe = family.make()
    schedule = Schedule(Pisa(block=16), warmup=0, noise_densities=(0.9, 0.3))
    family.run(sparsify(pipe, schedule), steps=4)
    steps = session_of(pipe).steps
    wanted = []
    for steps.step in range(4):
        wanted.append(schedule.method_for(Site(family.grid, sigma=steps.sigma)).density)
    # Blocks of a model as small as these are coarse.
    assert density_by(pipe, "step") == pytest.approx(wanted, abs=0.08)
    assert wanted == sorted(wanted, reverse=True)
    assert wanted[-1] < wanted[0] - 0.05


def test_each_layer_has_its_density(family: Family) -> None:
    pipe = family.make()
    layers = adapter_for(pipe).num_layers(pipe.transformer)
    wanted = [0.3 + 0.5 * n / layers for n in range(layers)]
    family.run(sparsify(pipe, Schedule(Pisa(block=16), warmup=0, layer_densities=tuple(wanted))), steps=2)
    assert density_by(pipe, "layer") == pytest.approx(wanted, abs=0.08)
    with pytest.raises(ValueError, match=f"layer_densities must have one value for each of {layers} layers"):
        family.run(sparsify(pipe, Schedule(Pisa(block=16), layer_densities=(0.5,) * (layers + 1))), steps=2)


def test_changes_of_the_velocity_are_means_over_runs() -> None:
    pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())
    sample = torch.zeros(1, 2, 2)

    def run() -> None:
        for velocities in ((0.0, 3.0, 2.0, 4.0), (1.0, 2.0, 5.0, 5.0)):
            pipe.scheduler.set_timesteps(4)
            for timestep, velocity in zip(pipe.scheduler.timesteps, velocities, strict=True):
                pipe.scheduler.step(torch.full_like(sample, velocity), timestep, sample)

    assert velocity_changes(pipe, run) == [2.0, 2.0, 2.0, 1.0]
    assert velocity_ramp(pipe, run, 0.2, warmup=0.25) == pytest.approx((0.24, 0.24, 0.12))
    assert vars(pipe.scheduler).get("step") is None, "the scheduler is as it was"


def test_a_scheduler_that_draws_noise_keeps_its_generator() -> None:
    """Pipelines hand it over where they find it among the parameters of the scheduler's `step`."""
    family = next(family for family in FAMILIES if family.name == "cogvideox")
    pipe, found = family.make(), []
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    dense = family.run(pipe)
    velocity_changes(pipe, lambda: found.append(family.run(pipe)))
    assert torch.equal(found[0], dense)
    velocity_changes(sparsify(pipe, ALL_DENSE), lambda: found.append(family.run(pipe)))
    assert torch.equal(found[1], dense)


def test_a_ramp_of_a_pipeline_serves_its_runs(pipe, render) -> None:
    dense = render(pipe, steps=5)
    ramp = velocity_ramp(pipe, lambda: render(pipe, steps=5), 0.4)
    assert len(ramp) == 4
    assert sum(ramp) / 4 == pytest.approx(0.4, abs=1e-3)
    render(sparsify(pipe, Schedule(METHOD, ramp=ramp)), steps=5)
    assert statistics(pipe).sparse_density == pytest.approx(0.4, abs=0.1)
    assert torch.equal(render(unsparsify(pipe), steps=5), dense)


@pytest.mark.parametrize(
    ("changes", "density", "want"),
    [
        ([1, 2, 3], 0.2, (0.1, 0.2, 0.3)),
        ([1, 1, 8], 0.5, (0.25, 0.25, 1.0)),
        ([0, 0, 0], 0.3, (0.3, 0.3, 0.3)),
        ([1, 1000], 0.1, (0.01, 0.19)),
        ([5], 1.0, (1.0,)),
    ],
)
def test_densities_are_bounded_and_keep_their_mean(changes, density, want) -> None:
    assert spread_density(changes, density) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "density", "message"),
    [([], 0.5, "changes must be"), ([-1.0], 0.5, "changes must be"), ([1.0], 0.0, "density must be from 0.01 to 1")],
)
def test_bad_changes_are_refused(changes, density, message) -> None:
    with pytest.raises(ValueError, match=message):
        spread_density(changes, density)


def test_a_run_without_steps_is_refused(pipe) -> None:
    with pytest.raises(ValueError, match="run must make at least two steps"):
        velocity_ramp(pipe, lambda: None, 0.2)
