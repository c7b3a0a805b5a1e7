"""The least densities with which a method keeps a wanted quality: of each layer's attention, or of the video.

Both go through a fixed list of densities, because neither error nor PSNR falls evenly with the density.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from dit_sparse.attention import sparse_attention
from dit_sparse.calibrate.run import Listener, run_dense
from dit_sparse.compare.render import Stage
from dit_sparse.eval.fidelity import psnr
from dit_sparse.kernels import dense_attention
from dit_sparse.methods.parameters import accepts_density, with_density
from dit_sparse.pipelines import observe_values
from dit_sparse.schedule import Schedule
from dit_sparse.types import Previous, Site

__all__ = ["DENSITIES", "LayerErrors", "Reached", "for_error", "for_psnr"]

DENSITIES = (0.04, 0.0625, 0.09, 0.125, 0.18, 0.25, 0.35, 0.5, 0.7)
"""What is tried, as means over a run."""


@dataclass(frozen=True)
class Reached:
    """A schedule with the wanted quality, and what was measured.

    Args:
        schedule: the one asked for, with the least densities that do.
        measured: by density: the relative error of each layer, or the PSNR of each prompt in dB.
    """

    schedule: Schedule
    measured: dict[float, list[float]]


@dataclass
class LayerErrors:
    """An observer, for `observe_values`, of the errors that a schedule's method would make at each density.

    Plans are made at the steps where the schedule makes them, for both branches, and compared with dense attention.

    Args:
        schedule: its method and remainder are what is measured.
        densities: means over a run.

    Attributes:
        sums: for each layer and density the squared error and the squared output, over all calls.
    """

    schedule: Schedule
    densities: Sequence[float]
    sums: defaultdict[tuple[int, float], list[float]] = field(
        default_factory=lambda: defaultdict(lambda: [0.0, 0.0]), init=False
    )

    def __call__(self, site: Site, q: Tensor, k: Tensor, v: Tensor, lse: Tensor) -> None:
        if site.step not in planned_steps(self.schedule, site.num_steps):
            return
        dense = dense_attention(q, k, v).float()
        for density in self.densities:
            method = with_density(self.schedule.method, density)
            plan = self.schedule.finish(method.plan(q, k, v, site, Previous(None, lse, site.step)))
            error, whole = self.sums[site.layer, density], dense.square().sum()
            error[0] += float((sparse_attention(q, k, v, plan).float() - dense).square().sum())
            error[1] += float(whole)

    def relative(self) -> dict[float, list[float]]:
        """By density, the norm of the error over that of the output of every layer."""
        layers = sorted({layer for layer, _ in self.sums})
        pairs = {d: [self.sums[layer, d] for layer in layers] for d in self.densities}
        return {d: [math.sqrt(error / whole) if whole else 0.0 for error, whole in own] for d, own in pairs.items()}


def planned_steps(schedule: Schedule, num_steps: int) -> set[int]:
    """Where a plan that depends on the data is made."""
    first = schedule.warmup_steps(num_steps)
    return {first, *(step for step in schedule.refresh_steps(num_steps) if step > first)}


def for_error(
    pipe: Any,
    prompts: Sequence[str],
    schedule: Schedule,
    error: float,
    *,
    densities: Sequence[float] = DENSITIES,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> Reached:
    """The least density of each layer with which its attention errs by at most `error` of its output.

    The pipeline runs dense, once a prompt; a layer that needs more than the largest density stays dense.

    Args:
        pipe: a supported pipeline, dense afterwards.
        prompts: one or two that are typical are enough.
        schedule: a method that takes a density, and when it applies.
        error: norm of the error over that of the dense output, over all heads, branches and planned steps of a layer.
        densities: what is tried.
        seed, listener, arguments: as in `calibrate`.

    Raises:
        ValueError: no prompt, a method without a density, an error outside (0, 1), or every layer would stay dense.
    """
    _check(prompts, schedule)
    if not 0 < error < 1:
        raise ValueError(f"error must be above 0 and below 1, got {error!r}: 0.05 is a twentieth of the output")
    listener, errors = listener or Listener(), LayerErrors(schedule, sorted(densities))
    with observe_values(pipe, errors):
        for prompt in prompts:
            listener.began("errors", prompt)
            run_dense(pipe, prompt, seed, listener, arguments)
    measured = errors.relative()
    rows = zip(*measured.values(), strict=True)
    least = [next((d for d, e in zip(measured, row, strict=True) if e <= error), None) for row in rows]
    dense = tuple(layer for layer, density in enumerate(least) if density is None)
    if len(dense) == len(least):
        best = min(itertools.chain(*measured.values()))
        raise ValueError(f"error must be one that some layer reaches, got {error:g}: the best here is {best:.3f}")
    return Reached(
        replace(
            schedule,
            layer_densities=tuple(1.0 if density is None else density for density in least),
            dense_layers=tuple(sorted({*schedule.dense_layers, *dense})),
        ),
        measured,
    )


def for_psnr(
    pipe: Any,
    prompts: Sequence[str],
    schedule: Schedule,
    decibels: float,
    *,
    densities: Sequence[float] = DENSITIES,
    seed: int = 0,
    listener: Listener | None = None,
    **arguments: Any,
) -> Reached:
    """The least density with which every prompt, and with every larger density too, is within `decibels` of dense.

    Renders each prompt dense, and then at falling densities until one of them falls short.

    Args:
        decibels: PSNR against the dense video, as `eval.fidelity` computes it.
        pipe, prompts, schedule, densities, seed, listener, arguments: as in `for_error`.

    Raises:
        ValueError: no prompt, a method without a density, no finite PSNR above 0, or the largest density falls short.
    """
    _check(prompts, schedule)
    if not (math.isfinite(decibels) and decibels > 0):
        raise ValueError(f"psnr must be a number of dB above 0, got {decibels!r}: 32 is a good video")
    listener, stage = listener or Listener(), Stage(pipe, arguments)

    def frames(at: Schedule | None, prompt: str) -> np.ndarray:
        listener.began("dense" if at is None else f"density {at.method.density:g}", prompt)  # type: ignore[attr-defined]
        return stage.render(at, prompt, seed).frames.clip(0, 1)

    dense = [frames(None, prompt) for prompt in prompts]
    best, measured = None, {}
    for density in sorted(densities, reverse=True):
        at = replace(schedule, method=with_density(schedule.method, density))
        measured[density] = [psnr(frames(at, prompt), own) for prompt, own in zip(prompts, dense, strict=True)]
        if min(measured[density]) < decibels:
            break
        best = at
    if best is None:
        found = min(next(iter(measured.values())))
        raise ValueError(
            f"psnr must be one that density {max(densities):g} reaches, got {decibels:g}: it has {found:.1f} dB"
        )
    return Reached(best, measured)


def _check(prompts: Sequence[str], schedule: Schedule) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    if not accepts_density(schedule.method):
        raise ValueError(f"method must be one with a density, got {schedule.method.name!r}; lea is one")
