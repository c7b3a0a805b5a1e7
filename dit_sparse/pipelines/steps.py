"""Counting denoising steps from the scheduler, which every diffusers pipeline drives in the same way."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor


class StepCounter:
    """Which step of which run the schedulers it watches are in.

    `set_timesteps` begins a run and `step` ends a step, so it listens to both on the instance. Steps still count when a
    cache skips blocks of the transformer, and schedulers without an index of their own work as well.

    Attributes:
        run: number of runs begun so far.
        on_step: is called after each step.
        step, num_steps: the step under way, and how many there are. A run that leaves the scheduler's first ones out,
            as image-to-image does with a `strength` below 1, counts from its own first.
    """

    def __init__(self) -> None:
        self.run = 0
        self.step = 0
        self.num_steps = 0
        self._first = 0
        self._sigmas: list[float] = []
        self._scheduler: Any = None
        self._watched: list[Any] = []
        self.on_step: Callable[[], None] | None = None

    @property
    def inside_run(self) -> bool:
        return self.step < self.num_steps

    @property
    def sigma(self) -> float | None:
        """Noise level of the step under way, where the scheduler has one, as in `Site`."""
        return self._sigmas[self.step] if self.step < len(self._sigmas) else None

    def watch(self, scheduler: Any) -> None:
        """Listen to `scheduler`, once; several counters may listen to one."""
        if self.watches(scheduler):
            return
        self._watched.append(scheduler)
        for name, listener in self._listeners.items():
            _telling(scheduler, name).listeners.append(listener)

    def adopt(self, scheduler: Any, timestep: Any = None) -> None:
        """Take a scheduler over whose `set_timesteps` was called before it was watched.

        Args:
            scheduler: the new one.
            timestep: the one that the pipeline is at. It tells a scheduler replaced in the middle of a run, which goes
                on, from one replaced before it; `None` is the first.
        """
        if not getattr(scheduler, "num_inference_steps", None):
            return
        step = 0 if timestep is None else int((scheduler.timesteps - float(timestep)).abs().argmin())
        here, end = self._first + self.step, self._first + self.num_steps
        if self.step > 0 and step == here and end == len(scheduler.timesteps):
            self._scheduler = scheduler
            self._sigmas = _sigmas_of(scheduler)[self._first :]
        else:
            self._begin(scheduler)

    def begin_at(self, timestep: Tensor | None) -> None:
        """Leave out the steps before the one that a run begins with; called once a run, before its first forward.

        The scheduler knows it in some pipelines, and in the others it is read off the forward.

        Args:
            timestep: of the forward, as the scheduler has it; of several the largest, as those of tokens that are
                given are lower. `None` or an unknown one leaves nothing out.
        """
        first = getattr(self._scheduler, "begin_index", None)
        if first is None and timestep is not None and self._scheduler is not None:
            first = _place(self._scheduler, float(timestep.max())) - self.step
        if first is not None and 0 < first < self.num_steps:
            self._first = first
            self.num_steps -= first
            del self._sigmas[:first]

    def watches(self, scheduler: Any) -> bool:
        return any(scheduler is watched for watched in self._watched)

    def release(self, keep: Collection[Any] = ()) -> None:
        """Stop listening to every scheduler that is not in `keep`."""
        for scheduler in list(self._watched):
            if any(scheduler is other for other in keep):
                continue
            self._watched.remove(scheduler)
            self._scheduler = None if scheduler is self._scheduler else self._scheduler
            for name, listener in self._listeners.items():
                _stop_telling(scheduler, name, listener)

    @property
    def _listeners(self) -> dict[str, Callable[[Any], None]]:
        return {"set_timesteps": self._begin, "step": self._end}

    def _begin(self, scheduler: Any) -> None:
        self.run += 1
        self.step = self._first = 0
        self.num_steps = len(scheduler.timesteps)
        self._scheduler = scheduler
        self._sigmas = _sigmas_of(scheduler)

    def _end(self, scheduler: Any) -> None:
        self.step += 1
        if self.on_step is not None:
            self.on_step()


def _place(scheduler: Any, timestep: float) -> int:
    """Which step of `scheduler` is at `timestep`; 0 for one that it does not have."""
    # Of second order it has most timesteps twice, and a run begins with the first of a pair.
    every = getattr(scheduler, "order", 1)
    return next((i for i, at in enumerate(scheduler.timesteps.tolist()) if at == timestep and i % every == 0), 0)


def _sigmas_of(scheduler: Any) -> list[float]:
    """Shares of noise by step. Other mixtures of signal and noise count as the one of flow matching with their SNR."""
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None:
        levels = [float(sigma) for sigma in sigmas]
        # Above 1 they are noise over signal, x + sigma noise, which no flow has.
        return [sigma / (1 + sigma) for sigma in levels] if levels and max(levels) > 1 else levels
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kept is None:
        return []
    alphas = [float(kept[int(timestep)]) for timestep in scheduler.timesteps]
    return [(1 - alpha) ** 0.5 / ((1 - alpha) ** 0.5 + alpha**0.5) for alpha in alphas]


class _Telling:
    """A method of one scheduler that tells listeners when it has run; stands in the instance's place of the method."""

    def __init__(self, scheduler: Any, name: str) -> None:
        self.method = getattr(scheduler, name)
        self.place = scheduler, name
        self.listeners: list[Callable[[Any], None]] = []
        functools.update_wrapper(self, self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.method(*args, **kwargs)
        for listener in self.listeners:
            listener(self.place[0])
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the scheduler has its own method, which nobody listens to.
        return getattr, self.place


def _telling(scheduler: Any, name: str) -> _Telling:
    if not isinstance(vars(scheduler).get(name), _Telling):
        setattr(scheduler, name, _Telling(scheduler, name))
    return vars(scheduler)[name]


def _stop_telling(scheduler: Any, name: str, listener: Callable[[Any], None]) -> None:
    telling = vars(scheduler).get(name)
    if not isinstance(telling, _Telling):  # somebody has wrapped it, and theirs stays
        return
    telling.listeners.remove(listener)
    if not telling.listeners:
        delattr(scheduler, name)
