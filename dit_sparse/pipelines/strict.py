"""Strictness: a layer that was to be sparse and would run dense ends the run, unless the schedule allows it."""

from __future__ import annotations

from dit_sparse.methods.parameters import takes_density
from dit_sparse.schedule import Schedule
from dit_sparse.types import Method

ALLOW = "or allow it with strict=False (`--no-strict`)"


class NotSparseError(ValueError):
    """A call that was to be sparse would run dense, and neither the schedule nor the cost model asked for that."""


def demands(schedule: Schedule) -> bool:
    """Whether a call that runs dense without being told to is an error under `schedule`."""
    return schedule.strict and schedule.method.name != "dense"


def check_inside_run(schedule: Schedule, layer: int, num_layers: int) -> None:
    """Called for a call of which no step is known.

    Raises:
        NotSparseError: `schedule` demands that it be sparse.
    """
    if demands(schedule) and not schedule.is_dense_layer(layer, num_layers):
        raise NotSparseError(
            f"layer {layer} would run dense: its transformer was called outside of a pipeline's run, so the step is "
            f"not known; call the pipeline that was sparsified, or unsparsify it, {ALLOW}"
        )


def check_blocks(schedule: Schedule, method: Method, layer: int, tokens: int) -> None:
    """Called for a plan that keeps every block.

    Raises:
        NotSparseError: `schedule` demands less, because `method` has a density below 1.
    """
    if not demands(schedule) or not takes_density(method):
        return
    density = float(method.density)  # type: ignore[attr-defined]
    if density < 1:
        raise NotSparseError(
            f"layer {layer} would run dense: {method.name!r} at density {density:g} keeps every block of {tokens} "
            f"tokens; make the blocks smaller or the video larger, {ALLOW}"
        )
