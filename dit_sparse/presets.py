"""What to start from with a model: method, schedule, size and steps, found by the checkpoint's name.

Those of public checkpoints were chosen on another model, with a margin; docs/presets.md says for each what was measured
and what not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from dit_sparse.course import step_densities
from dit_sparse.methods import LeastError, Neighborhood, nearest
from dit_sparse.schedule import Schedule

__all__ = ["PRESETS", "Defaults", "Preset", "find_preset", "preset"]

_ADASPA = "AdaSpa, arXiv 2502.21079"
_SVG = "Sparse VideoGen, arXiv 2502.01776"
_GNA = "Generalized Neighborhood Attention, arXiv 2504.16922"
_WAN = f"method and density: our own choice; warm-up: {_ADASPA}, for other models; first layer: {_SVG}"
_OTHERS = f"method and density: our own choice; warm-up: {_ADASPA}; first layer: {_SVG}"


class Defaults(NamedTuple):
    """Size in pixels, frames, steps and guidance scale, by the names that a request has for them.

    `fps` is frames a second of the file; images have none.
    """

    height: int
    width: int
    frames: int
    steps: int
    guidance: float
    fps: int | None = None


@dataclass(frozen=True)
class Preset:
    """Defaults for one checkpoint.

    Args:
        name: what it is called here.
        models: repositories on the hub; a model is recognised by what stands after the last slash. The demo model's is
            a word alone.
        schedule: the method and when it applies.
        defaults: size, steps and guidance that the checkpoint is published with.
        source: where method, density, warm-up and dense layers come from.
        measured: what has been measured here on a model of this shape; empty for nothing.
    """

    name: str
    models: tuple[str, ...]
    schedule: Schedule
    defaults: Defaults
    source: str
    measured: str = ""

    def row(self) -> dict[str, str]:
        """Its line of the table of presets, by column."""
        config, defaults = self.schedule.to_config(), self.defaults
        densities = step_densities(self.schedule, defaults.steps) or []
        sparse = dict.fromkeys(f"{density:.3g}" for density in densities[self.schedule.warmup_steps(defaults.steps) :])
        return {
            "name": self.name,
            "checkpoints": ", ".join(self.models),
            "method": config["method"],
            "density": f"{config['density']:g}",
            "in sparse steps": ", then ".join(sparse),
            "warm-up": f"{self.schedule.warmup:g}",
            "dense layers": ", ".join(map(str, self.schedule.dense_layers)) or "none",
            "size": f"{defaults.height}x{defaults.width}",
            "frames": str(defaults.frames),
            "steps": str(defaults.steps),
            "guidance": f"{defaults.guidance:g}",
            "from": self.source,
            "measured": self.measured or "nothing",
        }


def _lea(density: float) -> Schedule:
    """Our own method after a dense fifth of the steps, the first layer dense."""
    return Schedule(LeastError(density=density), warmup=0.2, dense_layers=(0,))


_PRESETS = (
    Preset(
        "demo",
        ("demo",),
        Schedule(LeastError(density=0.125, early=2.0), warmup=0),
        Defaults(96, 128, 29, 20, 3.5, 16),
        "our own choice, on this model",
        "speed and quality on a CPU",
    ),
    Preset(
        "wan2.1-1.3b",
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers",),
        _lea(0.3),
        Defaults(480, 832, 81, 50, 5.0, 16),
        _WAN,
        "speed of six layers, random weights",
    ),
    Preset(
        "wan2.1-14b",
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers"),
        _lea(0.25),
        Defaults(720, 1280, 81, 50, 5.0, 16),
        _WAN,
        "speed of four layers, random weights",
    ),
    Preset(
        "wan2.2-5b",
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers",),
        _lea(0.3),
        Defaults(704, 1280, 121, 50, 5.0, 24),
        f"{_WAN}, for Wan 2.1",
    ),
    Preset(
        "wan2.2-a14b",
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", "Wan-AI/Wan2.2-I2V-A14B-Diffusers"),
        _lea(0.25),
        Defaults(720, 1280, 81, 40, 4.0, 16),
        f"{_WAN}, for Wan 2.1",
    ),
    Preset(
        "cogvideox-2b",
        ("zai-org/CogVideoX-2b", "THUDM/CogVideoX-2b"),
        _lea(0.4),
        Defaults(480, 720, 49, 50, 6.0, 8),
        _OTHERS,
    ),
    Preset(
        "cogvideox-5b",
        ("zai-org/CogVideoX-5b", "THUDM/CogVideoX-5b"),
        _lea(0.4),
        Defaults(480, 720, 49, 50, 6.0, 8),
        _OTHERS,
        "speed of six layers, random weights",
    ),
    Preset(
        "cogvideox1.5-5b",
        ("zai-org/CogVideoX1.5-5B", "THUDM/CogVideoX1.5-5B"),
        _lea(0.3),
        Defaults(768, 1360, 81, 50, 6.0, 16),
        _OTHERS,
    ),
    Preset(
        "hunyuanvideo",
        ("hunyuanvideo-community/HunyuanVideo",),
        _lea(0.25),
        Defaults(720, 1280, 129, 50, 6.0, 24),
        _OTHERS,
        "speed of four layers, random weights",
    ),
    Preset(
        "flux.1-dev",
        ("black-forest-labs/FLUX.1-dev",),
        Schedule(Neighborhood(density=0.5, stride=(1, 16, 16)), warmup=0.3),
        Defaults(1024, 1024, 1, 28, 3.5),
        f"method and stride: {_GNA}, at density 0.1 and 4096x4096; density and warm-up: our own choice",
    ),
    Preset(
        "flux.1-schnell",
        ("black-forest-labs/FLUX.1-schnell",),
        Schedule(Neighborhood(density=0.5, stride=(1, 16, 16)), warmup=0.25),
        Defaults(1024, 1024, 1, 4, 0.0),
        f"method and stride: {_GNA}, for FLUX.1-dev; density and warm-up: our own choice",
    ),
)
PRESETS = {preset.name: preset for preset in _PRESETS}


def preset(name: str) -> Schedule:
    """The schedule of the preset called `name`, such as "wan2.1-14b", or of the checkpoint `name`.

    Raises:
        ValueError: no such preset, of which the nearest is named, or no name.
    """
    if not isinstance(name, str):
        raise ValueError(f"name of a preset must be a str such as 'wan2.1-14b', got {name!r}")
    found = PRESETS.get(name.lower()) or find_preset(name)
    if found is None:
        raise ValueError(f"unknown preset {name!r}; {nearest(name.lower(), PRESETS)}; `dit-sparse presets` lists them")
    return found.schedule


def find_preset(model: str) -> Preset | None:
    """The preset for a hub id, or for a folder that bears the repository's name; `None` where there is none."""
    last = model.rstrip("/").rpartition("/")[2].lower()
    # A folder that somebody called "demo" is no demo model.
    own = (p for p in _PRESETS if any(_known(name, model, last) for name in p.models))
    return next(own, None)


def _known(name: str, model: str, last: str) -> bool:
    return name == model if "/" not in name else name.rpartition("/")[2].lower() == last
