"""What a schedule comes to over a run; tests/estimate/test_course.py compares it with runs of pipelines."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_sparse import AdaSpa, Dense, LeastError, MInference, Neighborhood, Paro, Pisa, Schedule, Site, TokenGrid
from dit_sparse.course import plan_steps, plans_per_call, step_densities
from dit_sparse.methods.parameters import takes_density
from dit_sparse.types import Previous


def test_plans_that_a_run_comes_to() -> None:
    """With a drift, one that is exceeded at every look: every second step."""
    assert plans_per_call(Schedule(Pisa(), warmup=0), 10) == 1
    assert plans_per_call(Schedule(Pisa(), warmup=0.2, refresh=(0.5,)), 10) == pytest.approx(2 / 8)
    assert plans_per_call(Schedule(Pisa(), warmup=0, drift=0.1), 10) == pytest.approx(5 / 10)
    assert plans_per_call(Schedule(Neighborhood(density=0.5), warmup=0), 10) == 0


def test_steps_that_plan() -> None:
    assert plan_steps(Schedule(AdaSpa(), warmup=0), 10) == {1, 6}  # the first step gives the row sums
    assert plan_steps(Schedule(AdaSpa(), warmup=0.2), 10) == {2, 6}
    assert plan_steps(Schedule(Pisa(), warmup=0, refresh=(), ramp=(0.5, 0.2)), 10) == {0, 5}
    assert plan_steps(Schedule(Neighborhood(density=0.5)), 10) == set()
    assert plan_steps(Schedule(LeastError(), warmup=0, refresh=(5,)), 10) == {0, 2, 5}  # its density falls at 2
    assert plan_steps(Schedule(LeastError(), warmup=0.2, refresh=(5,)), 10) == {2, 5}
    layers = Schedule(LeastError(), warmup=0, refresh=(), layer_densities=(1.0, 0.2))
    assert plan_steps(layers, 10) == {0, 2}  # of the second layer; the first has every block at all times
    by_error = Schedule(LeastError(error=0.05), warmup=0, refresh=(), layer_thresholds=(0.1, 0.02))
    assert plan_steps(by_error, 10) == {0, 2}


@given(
    method=st.sampled_from([LeastError(), LeastError(error=0.05), AdaSpa(), Pisa(), MInference(), Paro()]),
    steps=st.integers(1, 30),
    warmup=st.sampled_from([0, 0.1, 0.2, 0.5, 1]),
    refresh=st.none() | st.lists(st.sampled_from([0.0, 0.05, 0.3, 0.99, 1, 3, 40]), max_size=3),
    ramp=st.none() | st.lists(st.sampled_from([0.2, 0.5, 1.0]), min_size=1, max_size=3),
    layers=st.none() | st.lists(st.sampled_from([0.2, 0.5, 1.0]), min_size=2, max_size=3),
)
def test_the_steps_that_plan_are_those_that_decide_to(method, steps, warmup, refresh, ramp, layers) -> None:
    name, ramp = ("layer_densities", ramp) if takes_density(method) else ("layer_thresholds", None)
    schedule = Schedule(method, warmup, refresh=refresh, ramp=ramp, **{name: layers})
    one = torch.zeros(1, 1, 1, 1)
    plan, found = Dense().plan(one, one, one, Site(TokenGrid(1, 1, 1)), None), set()
    for layer in range(len(layers or "1")):
        previous = None
        for step in range(steps):
            decision = schedule.decide(Site(TokenGrid(1, 1, 1), layer, len(layers or "1"), step, steps), previous)
            if decision.keep_lse:
                previous = Previous(None, one, step)
            elif decision.action == "plan":
                previous = Previous(plan, one, step)
                found.add(step)
    assert plan_steps(schedule, steps) == found


@pytest.mark.parametrize("warmup", [0, 0.1, 0.2])
@pytest.mark.parametrize("steps", range(1, 61))
def test_lea_plans_no_more_often_than_it_refreshes(steps: int, warmup: float) -> None:
    """Its density falls where its refresh has a search anyhow, and after a dense fifth not at all."""
    schedule = Schedule(LeastError(), warmup=warmup)
    first = schedule.warmup_steps(steps)
    want = {first} | {step for step in schedule.refresh_steps(steps) if step > first}
    assert plan_steps(schedule, steps) == {step for step in want if step < steps}


@pytest.mark.parametrize("refresh", [None, (), (0.5,), (1, 15)], ids=str)
@pytest.mark.parametrize("density", [0.06, 0.25, 0.7])
def test_lea_has_the_density_asked_for_whatever_its_refresh(density: float, refresh) -> None:
    densities = step_densities(Schedule(LeastError(density=density), warmup=0, refresh=refresh), 20)
    assert sum(densities) / 20 == pytest.approx(density)


def test_a_density_lasts_as_long_as_its_plan() -> None:
    method = LeastError(density=0.3)
    early, later = method.step_densities(10)[0], method.step_densities(10)[-1]
    assert step_densities(Schedule(method, warmup=0, refresh=()), 10) == pytest.approx([early] * 2 + [later] * 8)
    assert step_densities(Schedule(method, warmup=0), 10, plans={0, 8}) == pytest.approx([early] * 8 + [later] * 2)
    assert step_densities(Schedule(AdaSpa(density=0.2), warmup=0), 4) == pytest.approx([1.0, 0.2, 0.2, 0.2])
    ramp = Schedule(Neighborhood(density=0.5), warmup=0.2, ramp=(0.5, 0.25))
    assert step_densities(ramp, 10) == pytest.approx([1.0] * 2 + [0.5] * 4 + [0.25] * 4)
    assert step_densities(Schedule(AdaSpa(), noise_densities=(0.5, 0.1)), 10) is None
