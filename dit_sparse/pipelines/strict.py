"""Strictness: a layer that was to be sparse and would run dense ends the run, unless the schedule allows it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from dit_sparse.methods.parameters import density_at
from dit_sparse.schedule import Schedule
from dit_sparse.types import AttentionPlan, Method, Site

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


def check_plan(schedule: Schedule, method: Method, site: Site, plan: AttentionPlan) -> bool:
    """Called for a new plan of `method`.

    Returns:
        Whether it may keep every block without surprise, by the word of `method`.

    Raises:
        NotSparseError: it may not, `schedule` is strict, and it is known on the host to keep every block; what would
            have to be read back from the device is left to `check_layers`.
    """
    density = density_at(method, site)
    if plan.is_dense if density is None else density >= 1:
        return True
    # Without a density a method may leave its only block to the remainder.
    sure = density is not None or plan.remainder == "none"
    if demands(schedule) and (plan.is_dense or (sure and _has_one_video_block(plan, site))):
        at = "" if density is None else f" at density {density:g}"
        raise NotSparseError(
            f"layer {site.layer} would run dense: {method.name!r}{at} keeps every block of {site.grid.num_tokens} "
            f"tokens; make the blocks smaller or the video larger, {ALLOW}"
        )
    return False


def _has_one_video_block(plan: AttentionPlan, site: Site) -> bool:
    """Whether all video keys are in one block, which no predicate cuts and no kernel skips: text is kept anyhow."""
    if plan.skip_threshold or plan.block_mask.partial_counts is not None:
        return False
    order, start, length = plan.kv_order, site.grid.video_start, site.grid.video_len
    # The largest block is known on the host, so nothing waits where videos have blocks enough.
    return order.geometry.largest >= length and order.count_blocks(start, start + length) == 1


def check_layers(schedule: Schedule, dense: Sequence[tuple[str, int]], any_sparse: bool) -> None:
    """Called when a run has ended.

    Args:
        dense: model and layer of those of which every plan that was to keep less has kept every block.
        any_sparse: whether the run had a sparse call at all.

    Raises:
        NotSparseError: it had none, and `schedule` demands that it be sparse.

    Warns:
        UserWarning: the data had single layers keep everything, for which no finished video is thrown away.
    """
    if not dense or not demands(schedule):
        return
    model, layer = dense[0]
    others = f" (and {len(dense) - 1} more)" if len(dense) > 1 else ""
    text = f"layer {layer} of {model}{others} ran dense: {schedule.method.name!r} kept every block in each of its calls"
    if any_sparse:
        warnings.warn(text, stacklevel=2)
        return
    raise NotSparseError(f"{text}; let it keep less, make the blocks smaller or the video larger, {ALLOW}")


class Warner:
    """Says once what makes a run dense without its schedule's word; an error where `schedule` is strict."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._said = False

    def stranger(self, model: str) -> None:
        """Only pipelines name branches, so `model` is run by one whose scheduler is not watched.

        Raises:
            NotSparseError: the schedule is strict.
        """
        self._say(
            f"{model} is run by a pipeline whose scheduler is not followed, so its attention is dense; "
            "sparsify that pipeline"
        )

    def replaced(self, model: str) -> None:
        """Another transformer stands where `model` was made sparse.

        Raises:
            NotSparseError: the schedule is strict.
        """
        self._say(f"{model} was replaced in a sparse pipeline, so its attention is dense; sparsify it again")

    def _say(self, text: str) -> None:
        if demands(self._schedule):
            raise NotSparseError(f"{text}, {ALLOW}")
        if not self._said:
            self._said = True
            warnings.warn(text, stacklevel=4)
