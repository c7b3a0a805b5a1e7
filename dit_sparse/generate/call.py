"""One call of a pipeline: sparse for its duration, seeded and timed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dit_sparse.schedule import Schedule

__all__ = ["call_seeded", "free_memory", "interrupt_after", "render_frames", "sparsified", "warm_up_steps"]


@contextmanager
def sparsified(pipe: Any, schedule: Schedule | None) -> Iterator[None]:
    """Inside it `pipe` follows `schedule`; `None` leaves it as it is."""
    from dit_sparse.pipelines import sparsify, unsparsify

    if schedule is None:
        yield
        return
    sparsify(pipe, schedule)
    try:
        yield
    finally:
        unsparsify(pipe)


def call_seeded(pipe: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """What `pipe` returns for `arguments` with the noise of `seed`."""
    import torch

    # A generator on the CPU draws the same noise whatever the device.
    return pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed))


def render_frames(pipe: Any, arguments: Mapping[str, Any], seed: int) -> tuple[np.ndarray, float]:
    """Frames `[T, H, W, 3]` float in [0, 1] of one call, and its wall time in seconds, decoding included."""
    start = time.perf_counter()
    output = call_seeded(pipe, {**arguments, "output_type": "np"}, seed)
    seconds = time.perf_counter() - start
    return np.asarray(output.frames[0] if hasattr(output, "frames") else output.images), seconds


def warm_up_steps(schedule: Schedule | None, steps: int) -> int:
    """How many of the first of `steps` have run all that `schedule` does, or a plain pipeline for `None`.

    After the dense ones a step may be dense for its row sums; the next plans, and the one after it reuses the plan.
    """
    return 1 if schedule is None else min(steps, schedule.warmup_steps(steps) + 3)


def interrupt_after(last: int) -> Callable[..., dict[str, Any]]:
    """What a pipeline calls after each step, and by which it leaves the steps after `last` out."""

    def stepped(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= last
        return tensors

    return stepped


def free_memory() -> None:
    """Give back what a call that failed has left on the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
