"""Calibration of PAROAttention: two dense passes over the prompts, the first for the orders, the second for the masks.

Source: PAROAttention (arXiv 2506.16054), section 4. Memory stays bounded by one layer's block map: sums of block masses
wait on disk, and an attention map exists only for a few rows at a time.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dit_sparse.block_mask import pack_bits
from dit_sparse.calibrate.observers import MassSums, OrderSearch
from dit_sparse.calibrate.store import MassStore, Place
from dit_sparse.masks import blocks_above, heaviest_blocks, mass_threshold
from dit_sparse.methods import Paro
from dit_sparse.methods.plan_file import PlanFile, write_plans
from dit_sparse.methods.plan_header import ModelPlans, PlanHeader, one_line
from dit_sparse.pipelines import Observer, observe


class Listener:
    """Is told how a calibration goes; does nothing unless overridden."""

    def began(self, what: str, prompt: str) -> None:
        """Before each run of the pipeline on `prompt`, for "orders" or "masks"."""

    def stepped(self) -> None:
        """After each denoising step."""


@dataclass(frozen=True)
class Calibration:
    """How a plan file is made.

    Args:
        method: density, block and the metrics' parameters; its `plan_file` must be `None`.
        threshold: "head" gives every head and mask the density; "global" puts one threshold on all block masses, so
            that the whole file has it and heads that need more get more.
        shared_from: share of the run from which one mask serves all steps; before it each step has its own.
        seed: of each prompt's noise.

    Raises:
        ValueError: a value that is not allowed.

    Source: PAROAttention (arXiv 2506.16054), section 4: masks of their own for the first half of the steps.
    """

    method: Paro = field(default_factory=lambda: Paro(density=0.3))
    threshold: Literal["head", "global"] = "head"
    shared_from: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method.plan_file is not None:
            raise ValueError(f"method must have no plan_file to calibrate, got {self.method.plan_file!r}; leave it out")
        if self.threshold not in ("head", "global"):
            raise ValueError(f"threshold must be head or global, got {self.threshold!r}")
        if not 0 <= self.shared_from <= 1:
            raise ValueError(f"shared_from must be from 0 to 1, got {self.shared_from!r}: 0.5 is half of the run")

    def starts(self, steps: int) -> tuple[float, ...]:
        """Shares of a run of `steps` at which the masks change."""
        own = min(round(self.shared_from * steps), steps - 1)
        return tuple(step / steps for step in range(own + 1))


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    path: str | os.PathLike[str],
    calibration: Calibration | None = None,
    *,
    model: str = "",
    scratch: str | os.PathLike[str] | None = None,
    listener: Listener | None = None,
    **arguments: Any,
) -> PlanFile:
    """Choose the axis order of each head and static masks of its blocks, and write them for `Paro(plan_file=path)`.

    Metrics and block masses are averaged over prompts, guidance branches and steps. The plan serves one size, and any
    number of steps: its masks change at shares of the run.

    Args:
        pipe: a supported pipeline; it runs dense, and is dense afterwards.
        prompts: one or two that are typical are enough.
        path: the plan file.
        calibration: how; by default density 0.3 for each head.
        model: its name, stored for people.
        scratch: folder for the sums of block masses, by default that of `path`.
        listener: is told how it goes.
        arguments: of the pipeline's call, such as `height`, `num_frames` and `num_inference_steps`.

    Raises:
        ValueError: no prompt, an unsupported family, or too little room on disk.
        OSError: a file cannot be written.
    """
    calibration, listener = calibration or Calibration(), listener or Listener()
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of at least one prompt, got {prompts!r}")
    folder = Path(path).absolute().parent if scratch is None else Path(scratch)
    if not folder.is_dir():
        raise ValueError(f"the folder of path or scratch must exist, got {str(folder)!r}")

    def watch(what: str, observer: Observer) -> None:
        with observe(pipe, observer):
            for prompt in prompts:
                listener.began(what, prompt)
                run_dense(pipe, prompt, calibration.seed, listener, arguments)

    search = OrderSearch(calibration.method)
    watch("orders", search)
    starts, axes = calibration.starts(search.num_steps), search.axes()
    expected = (len(starts) + 1) * max(map(len, axes.values()))
    assert search.grid is not None
    with tempfile.TemporaryDirectory(prefix=".dit-sparse-", dir=folder) as own, MassStore(Path(own), expected) as store:
        watch("masks", MassSums(store, axes, calibration.method.cut, starts, search.grid))
        write_calibration(path, calibration, search, store, axes, model, prompts)
    return PlanFile.open(path)


def run_dense(
    pipe: Any,
    prompt: str,
    seed: int,
    listener: Listener,
    arguments: Mapping[str, Any],
    last: int | None = None,
) -> None:
    """Run `pipe` on `prompt` without decoding, up to the step `last` where it is given; `listener` is told of steps."""

    def stepped(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        listener.stepped()
        if last is not None:
            pipe._interrupt = step >= last
        return tensors

    own = {"generator": torch.Generator("cpu").manual_seed(seed), "callback_on_step_end": stepped}
    takes = inspect.signature(type(pipe).__call__).parameters
    own = {name: value for name, value in (own | {"output_type": "latent"}).items() if name in takes}
    pipe(prompt=prompt, **own, **arguments)


def write_calibration(
    path: str | os.PathLike[str],
    calibration: Calibration,
    search: OrderSearch,
    store: MassStore,
    axes: Mapping[str, Sequence[tuple[str, ...]]],
    model: str = "",
    prompts: Sequence[str] = (),
) -> None:
    """Choose the masks from the mean masses, a layer and slot at a time, and write the plan file.

    Args:
        path, calibration, model, prompts: as in `calibrate`.
        search, store: what the two passes found.
        axes: for each transformer and layer the order of each head, under which `store` has its masses.
    """
    header = _header(calibration, search, store, axes, model, prompts)
    choose = _chooser(store, header)
    with tempfile.TemporaryDirectory(dir=store.folder) as folder:
        bits = {}
        for name, plans in header.models.items():
            slots = store.slots(name)
            files = [(n, Path(folder) / f"{name}.{n}") for n in range(plans.layers)]
            bits[name] = [_packed(file, choose, [(name, n, slot) for slot in slots]) for n, file in files]
        write_plans(path, header, axes, bits, search.metrics())


def _header(
    calibration: Calibration,
    search: OrderSearch,
    store: MassStore,
    axes: Mapping[str, Sequence[tuple[str, ...]]],
    model: str,
    prompts: Sequence[str],
) -> PlanHeader:
    method, models = calibration.method, {}
    starts = calibration.starts(search.num_steps)
    for name, layers in axes.items():
        # A transformer that runs in some steps only, as each of Wan 2.2's does, has masks for those alone.
        own = (0.0, *(starts[slot] for slot in store.slots(name)[1:]))
        models[name] = ModelPlans(len(layers), len(layers[0]), own)
    assert search.grid is not None
    epsilon = 1 / search.grid.num_tokens if method.epsilon is None else method.epsilon
    return PlanHeader(
        grid=search.grid,
        block=method.cut,
        models=models,
        density=method.density,
        model=one_line(model),
        prompts=tuple(map(one_line, prompts)),
        steps=search.num_steps,
        threshold=calibration.threshold,
        metrics={
            "sigma": method.sigma,
            "epsilon": epsilon,
            "alpha": method.alpha,
            "sample_blocks": method.sample_blocks,
        },
        made_by=version("dit-sparse"),
    )


def _chooser(store: MassStore, header: PlanHeader) -> Callable[[Place], Tensor]:
    """What makes the mask `[1, H, M, M]` of a place."""
    density, offsets, grid = header.density, header.offsets, header.grid
    if header.threshold == "head":
        return lambda place: heaviest_blocks(store.mean(place), density, offsets, grid)

    def masses() -> Iterator[Tensor]:
        return map(store.mean, store.places)

    threshold = mass_threshold(masses, density, offsets, grid)
    return lambda place: blocks_above(store.mean(place), threshold, offsets, grid)


def _packed(file: Path, choose: Callable[[Place], Tensor], places: Sequence[Place]) -> Tensor:
    """The masks of one layer, `[S, H, M, ceil(M/8)]` uint8, in a mapped file so that they take no memory."""
    mapped = None
    for slot, place in enumerate(places):
        bits = pack_bits(choose(place))[0].numpy()
        if mapped is None:
            mapped = np.memmap(file, np.uint8, "w+", shape=(len(places), *bits.shape))
        mapped[slot] = bits
    assert mapped is not None
    return torch.from_numpy(mapped)
