"""A run as the command line describes it."""

from __future__ import annotations

import re
from dataclasses import fields, replace

from dit_sparse.estimate.machines import find_machine
from dit_sparse.estimate.predict import Run
from dit_sparse.estimate.shapes import find_shape
from dit_sparse.methods import find_method
from dit_sparse.methods.parameters import accepts_density, with_density
from dit_sparse.presets import PRESETS, find_preset
from dit_sparse.schedule import Schedule

__all__ = ["build_run"]


def build_run(
    model: str,
    *,
    method: str | None = None,
    density: float | None = None,
    block: int | None = None,
    frames: int | None = None,
    size: str | None = None,
    steps: int | None = None,
    warmup: float | None = None,
    guided: bool = True,
    device: str = "h100",
) -> Run:
    """The run of `model`, with its preset's method, size and steps where they are left out.

    Raises:
        ValueError: an unknown model, method or device, a size that does not fit, or a value that is missing.
    """
    shape, machine = find_shape(model), find_machine(device)
    preset = find_preset(model) or PRESETS.get(model.lower())
    if method is not None:
        schedule = Schedule(find_method(method)())
    elif preset is not None:
        schedule = preset.schedule
    else:
        raise ValueError(f"{model} has no preset: give --method")
    if warmup is not None:
        schedule = replace(schedule, warmup=warmup)
    if density is not None and accepts_density(schedule.method):
        schedule = replace(schedule, method=with_density(schedule.method, density))
        density = None
    if block is not None:
        if "block" not in {field.name for field in fields(schedule.method)}:  # type: ignore[arg-type]
            raise ValueError(f"--block: {schedule.method.name} takes none")
        schedule = replace(schedule, method=replace(schedule.method, block=block))  # type: ignore[type-var]
    height, width = (None, None) if size is None else _size(size)
    given = {"frames": frames, "height": height, "width": width, "steps": steps}
    if preset is not None:
        given = {name: getattr(preset.defaults, name) if value is None else value for name, value in given.items()}
    if missing := [name for name, value in given.items() if value is None]:
        options = dict.fromkeys("--size" if name in ("height", "width") else f"--{name}" for name in missing)
        raise ValueError(f"{model} has no preset: give {', '.join(options)}")
    return Run(shape, schedule=schedule, machine=machine, density=density, guided=guided, **given)  # type: ignore[arg-type]


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise ValueError(f"--size must be HEIGHTxWIDTH in pixels, such as 720x1280, got {text!r}")
    return int(found[1]), int(found[2])
