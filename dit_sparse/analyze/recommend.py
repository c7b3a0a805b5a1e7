"""Sums up what was measured, and chooses a schedule by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from dit_sparse.analyze.sample import BOUND, Candidate, Measured, by_label
from dit_sparse.methods import Dense
from dit_sparse.methods.parameters import check_share
from dit_sparse.schedule import Schedule

WORSE_LAYER = 0.1
"""A layer that recalls this much less than was asked for runs dense."""

STILL_GOOD = 0.95
"""A plan that recalls at least this share of what a new one would is used on."""


@dataclass(frozen=True)
class Summary:
    """One candidate over all sampled calls: means, and the worst.

    Args:
        label: of the candidate.
        kept, recall, error: means over calls and heads.
        worst: least recall of a head.
        reused: least recall of an earlier plan over that of a new one; `None` with one sampled step.
        time: predicted, over dense attention's; `None` where nobody has measured it.
    """

    label: str
    kept: float
    recall: float
    worst: float
    error: float
    reused: float | None
    time: float | None


@dataclass(frozen=True)
class Recommendation:
    """A schedule and why.

    Args:
        schedule: for `generate --config`, by its `to_config`.
        label: of the candidate; empty where dense attention is recommended.
        reached: whether it has the recall that was asked for.
        reasons: in words, one a choice.
    """

    schedule: Schedule
    label: str
    reached: bool
    reasons: list[str] = field(default_factory=list)


def summaries(rows: Sequence[Measured]) -> list[Summary]:
    """One a candidate, the best recall first."""
    found = []
    for label, own in by_label(rows).items():
        times = [row.time for row in own if row.time is not None]
        reused = [row.reused for row in own if row.reused is not None]
        found.append(
            Summary(
                label,
                kept=fmean(row.kept for row in own),
                recall=fmean(fmean(row.recall) for row in own),
                worst=min(min(row.recall) for row in own),
                error=fmean(fmean(row.error) for row in own),
                reused=min(reused, default=None),
                time=fmean(times) if times else None,
            )
        )
    return sorted(found, key=lambda row: -row.recall)


def recommend(
    candidates: Sequence[Candidate], rows: Sequence[Measured], target: float, num_steps: int
) -> Recommendation:
    """The candidate that is predicted to be fastest among those with a mean recall of `target`.

    Where none has that, the one of least error, its remainder counted, among those faster than dense attention;
    where none is faster, dense attention. Sampled layers that recall far less run dense, and plans are made anew at the
    sampled steps where the plan before has become stale.

    Raises:
        ValueError: a target outside (0, 1].
    """
    check_share("target", target)
    found = [row for row in summaries(rows) if not row.label.startswith(BOUND)]
    faster = [row for row in found if row.time is not None and row.time < 1]
    if not faster:
        reason = "nothing is predicted to be faster than dense attention here"
        return Recommendation(Schedule(Dense()), "", False, [reason])
    enough = [row for row in faster if row.recall >= target]
    best = min(enough, key=lambda row: row.time or 1.0) if enough else min(faster, key=lambda row: row.error)
    reasons = [
        f"{best.label} recalls {best.recall:.3f} of the attention mass and is predicted to take {best.time:.2f} of "
        f"dense attention's time; {len(enough)} of {len(faster)} that are faster than dense reach {target:g}"
    ]
    if not enough:
        reasons.append(f"none reaches {target:g}; this one errs least, by {best.error:.3f}, its remainder counted")
    method = next(candidate.method for candidate in candidates if candidate.label == best.label)
    own = by_label(rows)[best.label]
    dense_layers = _worse_layers(own, min(target, best.recall))
    if dense_layers:
        reasons.append(f"layers {', '.join(map(str, dense_layers))} recall far less and run dense")
    refresh = None
    if method.scope in ("sample", "call") and len(method.refresh) <= num_steps // 2:
        refresh = _stale_steps(own, Schedule(method).warmup_steps(num_steps), num_steps)
        shares = ", ".join(f"{share:.0%}" for share in refresh)
        reasons.append(f"plans go stale: made anew at {shares} of the run" if shares else "one plan serves the run")
    schedule = Schedule(method, dense_layers=dense_layers, refresh=refresh)
    return Recommendation(schedule, best.label, bool(enough), reasons)


def _worse_layers(rows: Sequence[Measured], target: float) -> tuple[int, ...]:
    by_layer: dict[int, list[float]] = {}
    for row in rows:
        by_layer.setdefault(row.layer, []).append(fmean(row.recall))
    worse = tuple(layer for layer, recalls in sorted(by_layer.items()) if fmean(recalls) < target - WORSE_LAYER)
    return worse if len(worse) < len(by_layer) else ()


def _stale_steps(rows: Sequence[Measured], first: int, num_steps: int) -> tuple[float, ...]:
    """Shares of the run, at the sampled steps after the step `first`, where the plan before has become stale."""
    by_step: dict[int, list[float]] = {}
    for row in rows:
        if row.reused is not None and row.step > first:
            by_step.setdefault(row.step, []).append(row.reused)
    return tuple(round(step / num_steps, 4) for step, shares in sorted(by_step.items()) if fmean(shares) < STILL_GOOD)
