"""Counting denoising steps from the scheduler, which every diffusers pipeline drives in the same way."""

from __future__ import annotations

import functools
from typing import Any


class StepCounter:
    """Which step of which run the schedulers it watches are in.

    `set_timesteps` begins a run and `step` ends a step, so both are wrapped on the instance. Steps still count when a
    cache skips blocks of the transformer, and schedulers without an index of their own work as well.

    Attributes:
        run: number of runs begun so far.
        step, num_steps: the step under way, and how many there are.
    """

    def __init__(self) -> None:
        self.run = 0
        self.step = 0
        self.num_steps = 0
        self._sigmas: list[float] = []
        self._watched: list[Any] = []

    @property
    def inside_run(self) -> bool:
        return self.step < self.num_steps

    @property
    def sigma(self) -> float | None:
        """Noise level of the step under way, where the scheduler has one."""
        return self._sigmas[self.step] if self.step < len(self._sigmas) else None

    def watch(self, scheduler: Any) -> None:
        """Wrap `scheduler`, once; a scheduler that has timesteps already is taken to be at its first step."""
        if any(scheduler is watched for watched in self._watched):
            return
        self._watched.append(scheduler)
        scheduler.set_timesteps = self._begins_run(scheduler, scheduler.set_timesteps)
        scheduler.step = self._ends_step(scheduler.step)

    def adopt(self, scheduler: Any) -> None:
        """Begin a run on a scheduler whose `set_timesteps` was called before it was watched."""
        if getattr(scheduler, "num_inference_steps", None):
            self._begin(scheduler)

    def watches(self, scheduler: Any) -> bool:
        return any(scheduler is watched for watched in self._watched)

    def release(self) -> None:
        """Unwrap every scheduler."""
        for scheduler in self._watched:
            del scheduler.set_timesteps, scheduler.step
        self._watched.clear()

    def _begin(self, scheduler: Any) -> None:
        self.run += 1
        self.step = 0
        self.num_steps = len(scheduler.timesteps)
        sigmas = getattr(scheduler, "sigmas", None)
        self._sigmas = [] if sigmas is None else [float(sigma) for sigma in sigmas]

    def _begins_run(self, scheduler: Any, set_timesteps: Any) -> Any:
        @functools.wraps(set_timesteps)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self._begin(scheduler)
            return result

        return wrapper

    def _ends_step(self, step: Any) -> Any:
        @functools.wraps(step)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            self.step += 1
            return result

        return wrapper
