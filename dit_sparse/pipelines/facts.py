"""What must be the same on all ranks that share a sequence, as JSON values by name."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_sparse.pipelines.layout import Layout
from dit_sparse.pipelines.steps import StepCounter
from dit_sparse.schedule import Schedule

__all__ = ["facts_of_forward", "facts_of_run"]

_SAMPLE = 1 << 20


def facts_of_forward(steps: StepCounter, layout: Layout, model: str, branch: str) -> dict[str, Any]:
    """Where a run is, and how the sequences of a forward are laid out."""
    return {
        "step": steps.step,
        "steps": steps.num_steps,
        "model": model,
        "branch": branch,
        "grid": str(layout.grid),
        "text lengths": layout.text_lens,
    }


def facts_of_run(schedule: Schedule, backend: str, latents: Tensor | None) -> dict[str, Any]:
    """What is run, and what it starts from."""
    config = schedule.to_config()
    facts = {f"config {name}": value for name, value in config.items()}
    facts |= {f"file {name}": _digest(value) for name, value in config.items() if _is_file(value)}
    facts |= {name: version(name) for name in ("torch", "diffusers", "dit-sparse")}
    if latents is not None:
        # One reading a run: ranks that draw unlike noise would make one picture of several.
        facts["latents"] = [list(latents.shape), float(latents.double().sum()), float(latents.double().abs().sum())]
    return facts | {"backend": backend}


def _is_file(value: Any) -> bool:
    return isinstance(value, str) and Path(value).is_file()


def _digest(path: str) -> str:
    """Hash of a file's size, beginning and end: plan and gate files may be large."""
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        content = file.read(_SAMPLE)
        file.seek(max(0, size - _SAMPLE))
        return hashlib.sha256(content + file.read() + str(size).encode()).hexdigest()[:16]
