"""A run step by step and layer by layer, with small pictures of its block masks."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.pipelines.session import Session
from dit_sparse.pipelines.sparsify import session_of
from dit_sparse.pipelines.statistics import CallRecord, Stopwatch
from dit_sparse.pipelines.steps import StepCounter
from dit_sparse.types import AttentionPlan, Site

FORMAT = 1
"""Version of the dict that `Trace.to_dict` gives."""

PICTURE_SIZE = 64
"""Cells a side of a mask's picture, at most."""

PICTURE_STEPS = 4
"""Parts of a run, of each of which the masks of the first step that plans are drawn."""

_LEVELS = 15
_FLOATS = 1 << 24


class Trace:
    """Follows one run of a sparsified pipeline; the run's statistics do most of the work.

    Args:
        session: of the pipeline.
        scheduler, device: of the pipeline, for the time of its steps.
    """

    def __init__(self, session: Session, scheduler: Any, device: torch.device) -> None:
        self._session = session
        self._clock = _StepClock(device)
        self._scheduler = scheduler
        self._pictures: dict[tuple[str, int], tuple[int, dict[int, _Pictures]]] = {}
        self._branches: dict[str, str] = {}

    def start(self) -> None:
        """Begin to listen."""
        self._clock.watch(self._scheduler)
        self._session.on_plan = self._on_plan

    def stop(self) -> None:
        """Listen no more."""
        self._clock.release()
        self._session.on_plan = None

    def _on_plan(self, site: Site, plan: AttentionPlan) -> None:
        if self._session.schedule.method.scope == "grid":
            return  # the session still has it when the run is over, and may have had it before
        if self._branches.setdefault(site.model, site.branch) != site.branch:
            return
        part = PICTURE_STEPS * site.step // site.num_steps
        step, layers = self._pictures.setdefault((site.model, part), (site.step, {}))
        if step == site.step:
            layers[site.layer] = _Pictures(site.branch, plan)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON; seconds, and densities as shares of query-key pairs.

        Returns:
            `format`: version of this dict.
            `steps`: of each step `step`, its `seconds` (`None` if it was not timed), `attention_seconds` and
            `plan_seconds` in it, and `density`, dense calls counted as 1.
            `tracks`: of each transformer (`model`) and guidance `branch`, the `steps` that it ran in; `actions`, the
            words for what a layer did ("plan" and "reuse" of a plan, else the reason of a dense call); `layers`, for
            each of its steps the number of each layer's action, `None` where it did not run; and `density`, where it
            changes: `step` and `heads`, a list of each layer's heads (one entry where all are alike), `None` for a
            dense layer.
            `masks`: `model`, `branch`, `layer` (`None`: all) and `step` of a plan, its `blocks` (query, key), and
            `png`, base64 of the pictures of its heads under each other, `size` (rows, columns) each: the share of
            blocks kept, rounded up to a 15th, in gray.
        """
        records = self._session.statistics.records
        groups: dict[tuple[str, str], list[CallRecord]] = {}
        for record in records:
            groups.setdefault((record.model, record.branch), []).append(record)
        return {
            "format": FORMAT,
            "steps": self._steps(records),
            "tracks": [_track(model, branch, own) for (model, branch), own in sorted(groups.items())],
            "masks": self._masks(),
        }

    def _steps(self, records: Sequence[CallRecord]) -> list[dict[str, Any]]:
        steps = []
        for number in sorted({record.step for record in records}):
            own = [record for record in records if record.step == number]
            densities = [1.0 if r.density is None else float(r.density.mean()) for r in own]
            steps.append(
                {
                    "step": number,
                    "seconds": self._clock.seconds(number),
                    "attention_seconds": sum(r.attention.seconds for r in own),
                    "plan_seconds": sum(r.planning.seconds for r in own if r.planning is not None),
                    "density": sum(densities) / len(densities),
                }
            )
        return steps

    def _masks(self) -> list[dict[str, Any]]:
        if self._session.schedule.method.scope == "grid":
            kept = self._session.previous.values()
            plans = [(previous.step, previous.plan.unpack()) for previous in kept if previous.plan is not None]
            return [{"model": None, "layer": None, "step": step} | _Pictures(None, p).to_dict() for step, p in plans]
        return [
            {"model": model, "layer": layer, "step": step} | pictures.to_dict()
            for (model, _), (step, layers) in self._pictures.items()
            for layer, pictures in layers.items()
        ]


@contextmanager
def record_trace(pipe: Any) -> Iterator[Trace]:
    """Follow the runs of `pipe` inside the `with` block; the trace is of the latest one.

    Raises:
        ValueError: the pipeline is not sparsified.
    """
    session = session_of(pipe)
    if session is None:
        raise ValueError(f"pipeline must be sparsified, got a dense {type(pipe).__name__}; call sparsify(pipe, method)")
    trace = Trace(session, pipe.scheduler, pipe._execution_device)
    trace.start()
    try:
        yield trace
    finally:
        trace.stop()


class _StepClock(StepCounter):
    """Times the steps of the latest run; the first begins where the scheduler gets its timesteps."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._watches: list[Stopwatch] = []

    def seconds(self, step: int) -> float | None:
        """Of a step that is over."""
        return self._watches[step].seconds if step < self.step else None

    def _begin(self, scheduler: Any) -> None:
        super()._begin(scheduler)
        self._watches = [Stopwatch(self._device)]

    def _end(self, scheduler: Any) -> None:
        if self._watches:
            self._watches[-1].stop()
            self._watches.append(Stopwatch(self._device))
            super()._end(scheduler)


class _Pictures:
    """Pictures of the masks of one plan's heads, left on their device until the run is over."""

    def __init__(self, branch: str | None, plan: AttentionPlan) -> None:
        kept = plan.block_mask.kept_blocks[0]
        self.branch = branch
        self.blocks = tuple(kept.shape[1:])
        size = min(self.blocks[0], PICTURE_SIZE), min(self.blocks[1], PICTURE_SIZE)
        # A few heads at a time: as floats, the blocks of all heads of a long video are hundreds of megabytes.
        few = kept.split(max(1, _FLOATS // kept[0].numel()))
        shares = torch.cat([F.adaptive_avg_pool2d(heads.float(), size) for heads in few])
        self.levels = (shares * _LEVELS - 1e-4).ceil().to(torch.uint8)

    def to_dict(self) -> dict[str, Any]:
        return {
            "branch": self.branch,
            "blocks": list(self.blocks),
            "size": list(self.levels.shape[1:]),
            "png": _png(self.levels * (255 // _LEVELS)),
        }


def _png(pictures: Tensor) -> str:
    """Base64 of a PNG of `[H, R, C]` uint8 pictures under each other."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pictures.flatten(0, 1).cpu().numpy()).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")


def _track(model: str, branch: str, records: Sequence[CallRecord]) -> dict[str, Any]:
    layers = max(record.layer for record in records) + 1
    by_step: dict[int, list[CallRecord | None]] = {}
    for record in records:
        by_step.setdefault(record.step, [None] * layers)[record.layer] = record
    words: dict[str, int] = {}
    actions: list[list[int | None]] = []
    density: list[dict[str, Any]] = []
    for step, row in sorted(by_step.items()):
        actions.append([None if r is None else words.setdefault(_action(r), len(words)) for r in row])
        heads = [None if r is None or r.density is None else _rounded(r.density) for r in row]
        if not density or density[-1]["heads"] != heads:
            density.append({"step": step, "heads": heads})
    return {
        "model": model,
        "branch": branch,
        "actions": list(words),
        "steps": sorted(by_step),
        "layers": actions,
        "density": density,
    }


def _action(record: CallRecord) -> str:
    if record.density is None:
        return record.reason
    return "reuse" if record.planning is None else "plan"


def _rounded(density: Tensor) -> list[float]:
    return [round(value, 4) for value in density.mean(0).tolist()]
