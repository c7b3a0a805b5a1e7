"""What a schedule comes to over a run, told before it: the steps that plan, and the density of each."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import lru_cache

from dit_sparse.methods.parameters import density_at, takes_density
from dit_sparse.schedule import Schedule
from dit_sparse.types import Site, TokenGrid

__all__ = ["plan_steps", "plans_after", "plans_per_call", "step_densities"]


@lru_cache(maxsize=64)
def plan_steps(schedule: Schedule, num_steps: int) -> frozenset[int]:
    """Steps of a run of `num_steps` that plan from the data, in some layer; with `drift` as many as it may come to.

    A static method has none. A second transformer plans at its own first step too, and a layer that a cache skips at
    one of these steps at its next call.
    """
    if schedule.method.scope == "grid":
        return frozenset()
    first = schedule.warmup_steps(num_steps)
    if schedule.method.uses_lse and first == 0:
        first = 1  # the first is dense, for its row sums
    found, planned = {first}, first
    for step in range(first + 1, num_steps):
        if any(schedule.is_outdated(planned, site) for site in _sites(schedule, step, num_steps)):
            found.add(step)
            planned = step
    if schedule.drift is not None:
        # What moved at one step is taken up at the next.
        found |= set(range(first + 2, num_steps, 2))
    return frozenset(step for step in found if step < num_steps)


def _sites(schedule: Schedule, step: int, num_steps: int) -> list[Site]:
    """One of every layer that has values of its own, or one that stands for all."""
    layers = len(schedule.layer_densities or schedule.layer_thresholds or (None,))
    return [Site(TokenGrid(1, 1, 1), layer, layers, step, num_steps) for layer in range(layers)]


def plans_per_call(schedule: Schedule, num_steps: int, forwards: int = 1) -> float:
    """Plans that a run of `num_steps` makes, over its sparse calls; 0 for a static method.

    Args:
        forwards: how many a step has, one a guidance branch; with some methods the first plans for all.
    """
    scope = schedule.method.scope
    if scope == "grid":
        return 0.0
    calls = max(1, num_steps - schedule.warmup_steps(num_steps)) * (forwards if scope == "sample" else 1)
    return max(1, len(plan_steps(schedule, num_steps))) / calls


def step_densities(schedule: Schedule, num_steps: int, plans: Collection[int] | None = None) -> list[float] | None:
    """Density of each step of a run: that of its plan, 1 in dense steps; of layers with their own the mean.

    `None` where it is not known before the run: it comes out of the data, or goes by the scheduler's noise.

    Args:
        plans: steps that plan, where they are not those of `plan_steps`.
    """
    if schedule.noise_densities is not None or not takes_density(schedule.method):
        return None
    steps = range(schedule.warmup_steps(num_steps), num_steps)
    if schedule.method.scope == "grid":
        plans = steps
    elif plans is None:
        plans = plan_steps(schedule, num_steps)
    found, density = [1.0] * num_steps, 1.0
    for step in steps:
        if step in plans:
            sites = _sites(schedule, step, num_steps)
            density = math.fsum(density_at(schedule.method_for(site), site) or 0.0 for site in sites) / len(sites)
        found[step] = density
    return found


def plans_after(schedule: Schedule, step: int, num_steps: int) -> bool:
    """Whether a layer that has planned at `step` may plan from the data again."""
    return schedule.drift is not None or any(at > step for at in plan_steps(schedule, num_steps))
