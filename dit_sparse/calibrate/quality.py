"""The least that a method computes with a wanted quality: of each layer's attention, or of the video.

A method that can choose by an error gets a threshold for each layer, and leaves its density to the data. The others get
densities, which are taken from a fixed list, because neither error nor PSNR falls evenly with the density.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.calibrate.run import Listener, run_dense
from dit_sparse.compare.render import Stage
from dit_sparse.course import plan_steps
from dit_sparse.eval.fidelity import psnr
from dit_sparse.kernels import dense_attention
from dit_sparse.methods.parameters import accepts_density, takes_error, with_density, with_threshold
from dit_sparse.pipelines import observe_values
from dit_sparse.schedule import Schedule
from dit_sparse.types import AttentionPlan, Method, PackedPlan, Previous, Site

__all__ = ["DENSITIES", "FACTORS", "THRESHOLDS", "LayerErrors", "Reached", "check_schedule", "for_error", "for_psnr"]

DENSITIES = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7)
"""What is tried with a method that goes by density, as means over a run."""

THRESHOLDS = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16)
"""What is tried with a method that goes by error; between two of them the error of a layer is interpolated."""

FACTORS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)
"""By what the thresholds of an error of `BASE` are multiplied for a wanted PSNR."""

BASE = 0.05


@dataclass(frozen=True)
class Reached:
    """A schedule with the wanted quality, and what was measured.

    Args:
        schedule: the one asked for, with the least densities or the largest thresholds that do.
        varied: what was tried: densities, thresholds, or factors on thresholds.
        measured: by what was tried: the relative error of each layer, or the PSNR of each prompt in dB.
        kept: by what was tried: the density that each layer had where errors were measured; empty for PSNR.
    """

    schedule: Schedule
    varied: Literal["density", "threshold", "factor"]
    measured: dict[float, list[float]]
    kept: dict[float, list[float]] = field(default_factory=dict)


@dataclass
class _Sums:
    """Squared error, squared output and density of one layer, summed over calls."""

    error: float = 0.0
    output: float = 0.0
    density: float = 0.0
    calls: int = 0

    @property
    def relative(self) -> float:
        return math.sqrt(self.error / self.output) if self.output else 0.0


@runtime_checkable
class _Searching(Protocol):
    """A method whose plans of every threshold come from one search."""

    def search(self, q: Tensor, k: Tensor, v: Tensor, site: Site) -> Any: ...

    def plan_from(self, found: Any, site: Site) -> AttentionPlan: ...


@dataclass
class LayerErrors:
    """An observer, for `observe_values`, of the errors that variants of a schedule's method would make.

    Plans are made at the steps where a run makes them (`course.plan_steps`), those of a static method at the first
    sparse one, once for all calls that share one, and what they give is compared with dense attention.

    Args:
        schedule: its steps and remainder.
        variants: of its method, by the density or the threshold that they have.
    """

    schedule: Schedule
    variants: Mapping[float, Method]
    _sums: defaultdict[tuple[int, float], _Sums] = field(default_factory=lambda: defaultdict(_Sums), init=False)
    _plans: dict[Any, dict[float, PackedPlan]] = field(default_factory=dict, init=False)
    _step: int = field(default=-1, init=False)

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.step not in _looked_at(self.schedule, site.num_steps):
            return
        if site.step != self._step:
            self.forget_plans()
            self._step = site.step
        dense = dense_attention(q, k, v).float()
        key = self.schedule.key(site)
        if key not in self._plans:
            self._plans[key] = self._planned(site, q, k, v, lse)
        for value, packed in self._plans[key].items():
            plan = packed.unpack()
            sums = self._sums[site.layer, value]
            sums.error += float((sparse_attention(q, k, v, plan).float() - dense).square().sum())
            sums.output += float(dense.square().sum())
            sums.density += float(plan.density.mean())
            sums.calls += 1

    def _planned(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> dict[float, PackedPlan]:
        """The plan of every variant; variants whose search is the same make it once."""
        methods, found = list(self.variants.items()), None
        if isinstance(first := methods[0][1], _Searching):
            found = first.search(q, k, v, site)
        plans = {}
        for value, method in methods:
            if isinstance(method, _Searching):
                plan = method.plan_from(found, site)
            else:
                plan = method.plan(q, k, v, site, Previous(None, lse, site.step))
            plans[value] = self.schedule.finish(plan).pack()
        return plans

    def forget_plans(self) -> None:
        """Before each run: the plans of another prompt are not shared."""
        self._plans.clear()

    def relative(self) -> dict[float, list[float]]:
        """By variant, the norm of the error over that of the output of every layer."""
        return {value: [sums.relative for sums in self._layers(value)] for value in self.variants}

    def densities(self) -> dict[float, list[float]]:
        """By variant, the mean density of every layer."""
        return {value: [sums.density / sums.calls for sums in self._layers(value)] for value in self.variants}

    def _layers(self, value: float) -> list[_Sums]:
        return [self._sums[layer, value] for layer in sorted({layer for layer, _ in self._sums})]


def _looked_at(schedule: Schedule, num_steps: int) -> frozenset[int]:
    """The steps that plan; of a static method, none of which does, the first sparse one."""
    return plan_steps(schedule, num_steps) or frozenset({schedule.warmup_steps(num_steps)})


def for_error(
    pipe: Any,
    prompts: Sequence[str],
    schedule: Schedule,
    error: float,
    *,
    densities: Sequence[float] = DENSITIES,
    thresholds: Sequence[float] = THRESHOLDS,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> Reached:
    """A threshold of each layer with which its attention errs by `error` of its output, or the least such density.

    The pipeline runs dense, once a prompt. A layer that errs by more with the smallest threshold or the largest density
    stays dense; one that errs by less with the largest threshold gets that one.

    Args:
        pipe: a supported pipeline, dense afterwards.
        prompts: one or two that are typical are enough.
        schedule: a method that takes an error or a density, and when it applies; one that `check_schedule` lets pass.
        error: norm of the error over that of the dense output, over all heads, branches and planned steps of a layer.
        densities: what is tried with a method that takes no error.
        thresholds: what is tried with one that does; between two of them the threshold is interpolated.
        seed, listener, arguments: as in `calibrate`.

    Raises:
        ValueError: no prompt, a method with neither, an error outside (0, 1), or every layer would stay dense, by its
            error or because the schedule has no sparse step.
    """
    _check(prompts, schedule)
    if not 0 < error < 1:
        raise ValueError(f"error must be above 0 and below 1, got {error!r}: 0.05 is a twentieth of the output")
    by_error = takes_error(schedule.method)
    vary = with_threshold if by_error else with_density
    variants = {value: vary(schedule.method, value) for value in sorted(thresholds if by_error else densities)}
    listener, errors = listener or Listener(), LayerErrors(schedule, variants)
    with observe_values(pipe, errors):
        for prompt in prompts:
            errors.forget_plans()
            listener.began("errors", prompt)
            run_dense(pipe, prompt, seed, listener, arguments)
    measured = errors.relative()
    rows = [list(row) for row in zip(*measured.values(), strict=True)]
    if not rows:
        raise ValueError(f"schedule must leave a step sparse, got a warm-up of {schedule.warmup:g} of the run")
    find = _threshold if by_error else _least_density
    found = [find(list(measured), row, error) for row in rows]
    dense = tuple(layer for layer, value in enumerate(found) if value is None)
    if len(dense) == len(found):
        best = min(itertools.chain(*measured.values()))
        raise ValueError(f"error must be one that some layer reaches, got {error:g}: the best here is {best:.3f}")
    reached = replace(schedule, dense_layers=tuple(sorted({*schedule.dense_layers, *dense})))
    if by_error:
        # A dense layer's own threshold is not used, but every layer must have one.
        reached = _with_thresholds(reached, [min(thresholds) if value is None else value for value in found])
    else:
        reached = replace(reached, layer_densities=tuple(1.0 if value is None else value for value in found))
    return Reached(reached, "threshold" if by_error else "density", measured, errors.densities())


def _least_density(densities: Sequence[float], errors: Sequence[float], wanted: float) -> float | None:
    """The first of rising `densities` whose error is at most `wanted`."""
    return next((d for d, e in zip(densities, errors, strict=True) if e <= wanted), None)


def _threshold(thresholds: Sequence[float], errors: Sequence[float], wanted: float) -> float | None:
    """Where the error passes `wanted` first as thresholds rise, as a power between neighbours; the last if nowhere."""
    above = next((place for place, error in enumerate(errors) if error > wanted), None)
    if above is None:
        return thresholds[-1]
    if above == 0:
        return None
    low, high = errors[above - 1], errors[above]
    # Where the smaller error is 0, no power leads from one to the other.
    share = math.log(wanted / low) / math.log(high / low) if low > 0 else 0.0
    return thresholds[above - 1] * (thresholds[above] / thresholds[above - 1]) ** share


def _with_thresholds(schedule: Schedule, thresholds: Sequence[float]) -> Schedule:
    method = with_threshold(schedule.method, statistics.median(thresholds))
    return replace(schedule, method=method, layer_thresholds=tuple(thresholds))


def for_psnr(
    pipe: Any,
    prompts: Sequence[str],
    schedule: Schedule,
    decibels: float,
    *,
    densities: Sequence[float] = DENSITIES,
    thresholds: Sequence[float] = THRESHOLDS,
    factors: Sequence[float] = FACTORS,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> Reached:
    """The least that a method computes so that every prompt is within `decibels` of dense, and with all more too.

    Renders each prompt dense, and then at falling densities until one of them falls short. With a method that takes an
    error, the thresholds of the layers are first found for the error `BASE`, and then multiplied by rising `factors`.
    Layers that would not be faster here are measured sparse all the same, whatever the schedule's `never_slower` says.

    Args:
        decibels: PSNR against the dense video, as `eval.fidelity` computes it.
        factors: what is tried with a method that takes an error.
        pipe, prompts, schedule, densities, thresholds, seed, listener, arguments: as in `for_error`.

    Raises:
        ValueError: no prompt, as `check_schedule`, no finite PSNR above 0, or what is tried first falls short.
    """
    _check(prompts, schedule)
    if not (math.isfinite(decibels) and decibels > 0):
        raise ValueError(f"psnr must be a number of dB above 0, got {decibels!r}: 32 is a good video")
    listener, stage = listener or Listener(), Stage(pipe, arguments)
    varied: Literal["density", "factor"] = "factor" if takes_error(schedule.method) else "density"
    if varied == "factor":
        calls = {"thresholds": thresholds, "seed": seed, "listener": listener, **arguments}
        base = for_error(pipe, prompts, schedule, BASE, **calls).schedule
        base = replace(base, dense_layers=schedule.dense_layers)
        tried = {factor: _scaled(base, factor) for factor in sorted(factors)}
    else:
        ordered = sorted(densities, reverse=True)
        tried = {d: replace(schedule, method=with_density(schedule.method, d)) for d in ordered}

    def frames(what: str, at: Schedule | None, prompt: str) -> np.ndarray:
        listener.began(what, prompt)
        # A layer that the cost model has run dense would be measured as one that errs by nothing.
        sparse = None if at is None else replace(at, never_slower=False)
        return stage.render(sparse, prompt, seed).frames.clip(0, 1)

    dense = [frames("dense", None, prompt) for prompt in prompts]
    best, measured = None, {}
    for value, at in tried.items():
        made = (frames(f"{varied} {value:g}", at, prompt) for prompt in prompts)
        measured[value] = [psnr(own, plain) for own, plain in zip(made, dense, strict=True)]
        if min(measured[value]) < decibels:
            break
        best = at
    if best is None:
        value, found = next(iter(measured.items()))
        raise ValueError(
            f"psnr must be one that {varied} {value:g} reaches, got {decibels:g}: it has {min(found):.1f} dB"
        )
    return Reached(best, varied, measured)


def _scaled(schedule: Schedule, factor: float) -> Schedule:
    assert schedule.layer_thresholds is not None
    return _with_thresholds(schedule, [min(0.99, factor * value) for value in schedule.layer_thresholds])


def check_schedule(schedule: Schedule) -> None:
    """Whether a density or thresholds can be found for `schedule`.

    Raises:
        ValueError: its method has neither, or it says itself what each step or layer has.
    """
    if not (takes_error(schedule.method) or accepts_density(schedule.method)):
        raise ValueError(f"method must be one with a density or an error, got {schedule.method.name!r}; lea is one")
    for name in ("ramp", "noise_densities", "layer_densities", "layer_thresholds"):
        if getattr(schedule, name) is not None:
            raise ValueError(
                f"{name} must be none where a quality decides, got {getattr(schedule, name)}: leave it out"
            )


def _check(prompts: Sequence[str], schedule: Schedule) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    check_schedule(schedule)
