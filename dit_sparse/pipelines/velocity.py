"""Densities by step from how much the predicted velocity changes, measured on dense runs of a pipeline.

Source: PASA (arXiv 2604.12219), curvature-aware budgets: the density of a step is the wanted one times the L1 distance
of the velocities of this step and the one before, over the mean of all sparse steps.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dit_sparse.pipelines.steps import StepCounter

_LEAST = 0.01


def velocity_ramp(pipe: Any, run: Callable[[], object], density: float, warmup: float = 0.2) -> tuple[float, ...]:
    """A `ramp` for `Schedule` with one density for each sparse step, whose mean is `density`.

    Steps at which the path of the samples bends get more blocks than those at which it is straight. It serves runs of
    other prompts, and of other numbers of steps, as `ramp` cuts the sparse steps in equal parts.

    Args:
        pipe: a pipeline that is dense, or sparse with a quality like it.
        run: calls it, once a prompt; the paper takes 10 prompts.
        density: the mean over the sparse steps.
        warmup: as in `Schedule`.

    Raises:
        ValueError: a density or warm-up outside its range, or `run` made no sparse step.
    """
    check_mean(density)
    changes = velocity_changes(pipe, run)
    first = math.ceil(round(warmup * len(changes), 6))
    return spread_density(changes[first:], density)


def velocity_changes(pipe: Any, run: Callable[[], object]) -> list[float]:
    """Mean |v - v'| of what the scheduler of `pipe` is given at each step and at the one before, over all runs.

    The first step of a run has none before it, and counts as the second.
    """
    scheduler, counter = pipe.scheduler, StepCounter()
    found: defaultdict[int, list[float]] = defaultdict(list)
    last: list[Tensor] = []
    counter.watch(scheduler)
    step = scheduler.step

    @functools.wraps(step)  # pipelines look at its parameters for what they may hand to it
    def listening(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        if counter.step > 0:
            found[counter.step].append(float((model_output.float() - last.pop()).abs().mean()))
        last[:] = [model_output.float()]
        return step(model_output, *args, **kwargs)

    scheduler.step = listening
    try:
        run()
    finally:
        scheduler.step = step
        counter.release()
    if not found:
        raise ValueError("run must make at least two steps of the pipeline, got fewer: call the pipeline in it")
    changes = [sum(found[at]) / len(found[at]) for at in sorted(found)]
    return [changes[0], *changes]


def spread_density(changes: Sequence[float], density: float) -> tuple[float, ...]:
    """Densities in proportion to `changes` whose mean is `density`; none is above 1 or below 0.01.

    What a step would have above 1 goes to the others.

    Raises:
        ValueError: no change, a negative one, or a density outside [0.01, 1].
    """
    if not changes or any(not math.isfinite(change) or change < 0 for change in changes):
        raise ValueError(f"changes must be numbers from 0 on, at least one, got {list(changes)}")
    check_mean(density)
    # The factor by which the bounded densities have the wanted mean lies between one that is too small and one too big.
    if not any(changes):
        return (density,) * len(changes)
    low, high = 0.0, 1 / min(change for change in changes if change > 0)
    for _ in range(200):
        middle = (low + high) / 2
        mean = sum(_bounded(middle * change) for change in changes) / len(changes)
        low, high = (middle, high) if mean < density else (low, middle)
    return tuple(round(_bounded(high * change), 4) for change in changes)


def check_mean(density: float) -> None:
    """Raise ValueError unless `density` can be the mean of a ramp."""
    if not _LEAST <= density <= 1:
        raise ValueError(f"density must be from {_LEAST} to 1 to be the mean of a ramp, got {density!r}")


def _bounded(density: float) -> float:
    return min(1.0, max(_LEAST, density))
