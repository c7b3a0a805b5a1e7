"""Renders one video at a time with a loaded pipeline, sparse or plain, and says what was run."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_sparse.generate.call import call_seeded, interrupt_after, render_frames, sparsified, warm_up_steps

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

__all__ = ["Rendering", "Stage", "interrupt_after"]


@dataclass(frozen=True)
class Rendering:
    """One video and what its run did.

    Args:
        frames: `[T, H, W, 3]` float32 in [0, 1], or slightly beyond.
        seconds: wall time of the pipeline's call, decoding included.
        statistics: densities, calls, dense calls by reason, receipts of every layer, backends and times; empty for
            plain diffusers.
        trace: what `pipelines.Trace.to_dict` gives; `None` for plain diffusers, and where it was not asked for.
    """

    frames: np.ndarray
    seconds: float
    statistics: dict[str, Any]
    trace: dict[str, Any] | None = None


class Stage:
    """A pipeline that renders with any schedule and is plain in between.

    Args:
        pipe: a diffusers pipeline.
        arguments: of its call, but for the prompt and what comes out.
    """

    def __init__(self, pipe: Any, arguments: Mapping[str, Any]) -> None:
        self.pipe, self.arguments = pipe, dict(arguments)

    def render(self, schedule: Schedule | None, prompt: str, seed: int, *, trace: bool = False) -> Rendering:
        """Render `prompt`; a schedule of `None` is plain diffusers, which leaves no trace."""
        from dit_sparse.pipelines import record_trace

        with sparsified(self.pipe, schedule):
            traced = trace and schedule is not None
            with record_trace(self.pipe) if traced else contextlib.nullcontext() as recorder:
                frames, seconds = render_frames(self.pipe, self.arguments | {"prompt": prompt}, seed)
            statistics = {} if schedule is None else _statistics(self.pipe)
            found = None if recorder is None else recorder.to_dict()
        return Rendering(frames.astype(np.float32, copy=False), seconds, statistics, found)

    def warm_up(self, schedule: Schedule | None, prompt: str, steps: int) -> None:
        """Run the first steps of `schedule`, untimed, so that no timing pays for compilation and first allocations."""
        last = warm_up_steps(schedule, steps) - 1
        with sparsified(self.pipe, schedule):
            self.call(prompt, 0, output_type="np", callback_on_step_end=interrupt_after(last))

    def call(self, prompt: str, seed: int, **options: Any) -> Any:
        """What the pipeline returns for `prompt`."""
        return call_seeded(self.pipe, self.arguments | options | {"prompt": prompt}, seed)


def _statistics(pipe: Any) -> dict[str, Any]:
    from dit_sparse.pipelines import statistics

    run = statistics(pipe)
    found = run.to_dict() | {"receipts": run.receipts()}
    del found["layers"]
    return found
