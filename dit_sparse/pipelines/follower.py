"""Which run a session is in, and what a forward of it is: the schedulers tell some of it, the pipelines the rest."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dit_sparse.pipelines.steps import StepCounter

__all__ = ["Follower"]

_BOTH = "cond_uncond"


class Follower:
    """Follows the runs of pipelines, also after their schedulers are replaced.

    Args:
        pipelines: those to follow from the first forward on.

    Attributes:
        steps: where the run is.
        forwards: how many a step of the run has, one a guidance branch; 1 too where the pipeline does not say.
    """

    def __init__(self, pipelines: Iterable[Any] = ()) -> None:
        self.steps = StepCounter()
        self._pipelines: weakref.WeakSet[Any] = weakref.WeakSet(pipelines)
        self._run = 0
        self._samples = 0
        self.forwards = 1
        self._unnamed_forwards = (-1, 0)

    def copy(self, memo: dict[int, Any]) -> Follower:
        """One that has yet to see a run, of those copies of the pipelines that `memo` of `copy.deepcopy` has."""
        return Follower(memo[id(pipe)] for pipe in self._pipelines if id(pipe) in memo)

    @property
    def pipelines(self) -> list[Any]:
        """Those that are followed and still there."""
        return list(self._pipelines)

    def watch(self, pipe: Any) -> None:
        """Follow the steps of `pipe`'s scheduler, also after it is replaced."""
        self._pipelines.add(pipe)
        self.steps.watch(pipe.scheduler)

    def has_begun(self, branch: str | None = None, batch: int = 0, timestep: Tensor | None = None) -> bool:
        """Whether a run has begun since this was last asked; called before every forward.

        Args:
            branch, batch, timestep: guidance branch, samples and timesteps of the forward.
        """
        self._follow_schedulers()
        if self.steps.run == self._run:
            return False
        self._run = self.steps.run
        self._unnamed_forwards = (-1, 0)
        self.steps.begin_at(timestep)
        pipe = self._running(timestep)
        both = branch == _BOTH and batch % 2 == 0 and _guides(pipe)
        alone = branch not in (None, _BOTH)
        self.forwards = 2 if alone and getattr(pipe, "do_classifier_free_guidance", False) else 1
        self._samples = batch // 2 if both else batch
        return True

    def branch(self, name: str | None) -> str:
        """`name`; without one, forwards of one step are told apart by their number, so that their plans never mix."""
        if name is not None:
            return name
        step, count = self._unnamed_forwards
        count = count + 1 if step == self.steps.step else 0
        self._unnamed_forwards = (self.steps.step, count)
        return f"forward {count}"

    def branches(self, branch: str, batch: int) -> int:
        """How many guidance branches of each sample a call with `batch` samples has, as in `Site`.

        The number of samples is that of the run's first forward: FasterCache leaves a branch out at some steps, and a
        callback may end guidance.
        """
        return 2 if branch == _BOTH and batch == 2 * self._samples else 1

    def _follow_schedulers(self) -> None:
        pipelines = self.pipelines
        if all(self.steps.watches(pipe.scheduler) for pipe in pipelines):
            return
        for pipe in pipelines:
            if not self.steps.watches(pipe.scheduler):
                self.steps.watch(pipe.scheduler)
                self.steps.adopt(pipe.scheduler, getattr(pipe, "_current_timestep", None))
        self.steps.release(keep=[pipe.scheduler for pipe in pipelines])

    def _running(self, timestep: Tensor | None) -> Any:
        """The pipeline that is at `timestep`; `None` where none of those that are followed is."""
        if timestep is None:
            return None
        for pipe in self._pipelines:
            current = getattr(pipe, "_current_timestep", None)
            if current is not None and float(current) == float(timestep.max()):
                return pipe
        return None


def _guides(pipe: Any) -> bool:
    """Whether `pipe` has guidance on, both branches in one batch.

    Asked at the first forward, as CogVideoX's dynamic guidance sets the scale to 1 in between.
    """
    scale = getattr(pipe, "guidance_scale", None) or 0.0
    return bool(getattr(pipe, "do_classifier_free_guidance", scale > 1))
