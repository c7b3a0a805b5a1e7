"""Which model, device and precision a request means, and what the model takes where the request leaves it open."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_sparse.demo import demo_defaults, demo_model_path
from dit_sparse.generate.request import Degrees, Request

if TYPE_CHECKING:
    from dit_sparse.presets import Preset

__all__ = [
    "DEMO",
    "DTYPES",
    "call_arguments",
    "call_parameters",
    "check_ranks",
    "default_fps",
    "known_defaults",
    "load_model",
    "model_name",
    "pipeline_defaults",
    "resolve_device",
    "resolve_dtype",
]

DEMO = "demo"
DTYPES = ("float32", "float16", "bfloat16")
_FPS = 16
_ARGUMENTS = {
    "height": "height",
    "width": "width",
    "frames": "num_frames",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
}
"""The request's names and the pipelines' own."""


def model_name(model: str | None) -> str:
    """The name of `model` in the manifest: "demo", an absolute folder, or a hub id."""
    if model is None or model == DEMO:
        return DEMO
    path = Path(model)
    if not path.exists():
        return model
    resolved = path.resolve()
    return DEMO if resolved == _demo_folder() else str(resolved)


def load_model(request: Request) -> Any:
    """The diffusers pipeline that `request` means, on its device.

    Raises:
        ValueError, OSError: no such model, not a diffusers model, a family that is not supported, a corrupt file.
    """
    import torch

    from dit_sparse.pipelines import load_pipeline, parallelize

    folder = _folder(request)
    _refuse_preset_name(folder)
    device = resolve_device(request.device)
    dtype = getattr(torch, resolve_dtype(request.dtype, device))
    pipe = load_pipeline(folder, dtype=dtype, device=device, offload=request.offload)
    pipe.set_progress_bar_config(disable=True)
    if request.parallel is not None:
        degrees = Degrees.of(request.parallel)
        parallelize(pipe, ulysses=degrees.ulysses, ring=degrees.ring, timeout=degrees.timeout)
    return pipe


def check_ranks(request: Request) -> None:
    """Whether the ranks that `request` asks for can share its model, as far as that can be told without loading it.

    Raises:
        ValueError: they cannot.
    """
    from dit_sparse.pipelines.context_parallel import check_unloaded
    from dit_sparse.schedule import Schedule

    assert request.parallel is not None
    degrees, schedule = Degrees.of(request.parallel), Schedule.from_config(dict(request.config))
    check_unloaded(_folder(request), schedule, ulysses=degrees.ulysses, ring=degrees.ring)


def _folder(request: Request) -> str:
    """Where the model of `request` is: a folder or a hub id."""
    demo = request.model is None or model_name(request.model) == DEMO
    return str(demo_model_path() if demo else request.model)


def _refuse_preset_name(model: str) -> None:
    from dit_sparse.presets import PRESETS

    preset = PRESETS.get(model.lower())
    if preset is not None and not Path(model).exists():
        raise ValueError(
            f"--model {model!r} is the name of a preset: give its checkpoint, {' or '.join(preset.models)}"
        )


def resolve_device(name: str) -> str:
    """The device called `name`; "auto" is the first GPU, or else the CPU.

    Raises:
        ValueError: no such device, or not here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch finds no GPU here; use --device cpu (`dit-sparse doctor` says more)")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return str(device)


def resolve_dtype(name: str, device: str) -> str:
    """The precision called `name`; "auto" is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        ValueError: no such precision.
    """
    if name == "auto":
        return "float32" if device.startswith("cpu") else "bfloat16"
    if name not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return name


def known_defaults(request: Request) -> dict[str, Any] | None:
    """Sizes, steps and guidance of `request`, where that can be said without loading its model."""
    asked = {name: getattr(request, name) for name in _ARGUMENTS}
    if model_name(request.model) == DEMO:
        return _fill(asked, {name: demo_defaults[argument] for name, argument in _ARGUMENTS.items()})
    asked |= _preset_defaults(request)
    return asked if all(value is not None for value in asked.values()) else None


def pipeline_defaults(request: Request, pipe: Any) -> dict[str, Any]:
    """Sizes, steps and guidance of `request`, with the defaults of its preset or of the pipeline's own `__call__`.

    Raises:
        ValueError: `request` sets something that the pipeline does not take.
    """
    takes = call_parameters(pipe)
    asked = {name: getattr(request, name) for name in _ARGUMENTS}
    if "image" in takes and takes["image"].default is inspect.Parameter.empty:
        raise ValueError(
            f"--model: {type(pipe).__name__} needs an image, which only Python can give it: sparsify(pipe)"
        )
    if request.negative_prompt is not None and "negative_prompt" not in takes:
        raise ValueError(f"--negative-prompt: {type(pipe).__name__} takes none")
    if request.negative_prompt is not None and "true_cfg_scale" in takes:
        raise ValueError(
            f"--negative-prompt: {type(pipe).__name__} heeds one only with true_cfg_scale, which only Python can set"
        )
    if "num_frames" not in takes and asked["frames"] not in (None, 1):
        raise ValueError(f"--frames must be 1: {type(pipe).__name__} makes single images, got {asked['frames']}")
    if "num_frames" not in takes and request.format not in (None, "png"):
        raise ValueError(f"--format must be png: {type(pipe).__name__} makes single images, got {request.format}")
    if "guidance_scale" not in takes and asked["guidance"] is not None:
        raise ValueError(f"--guidance: {type(pipe).__name__} takes none")
    asked |= _preset_defaults(request)
    return _fill(asked, {name: _default(pipe, takes, name) for name in _ARGUMENTS})


def default_fps(request: Request) -> int:
    """Frames a second where `request` leaves them open."""
    preset = _preset(request)
    return _FPS if preset is None else preset.defaults.fps or _FPS


def _preset(request: Request) -> Preset | None:
    from dit_sparse.presets import find_preset

    return None if request.model is None else find_preset(request.model)


def _preset_defaults(request: Request) -> dict[str, Any]:
    """What the preset of the model says of what `request` leaves open."""
    preset = _preset(request)
    defaults = {} if preset is None else preset.defaults._asdict()
    return {name: value for name, value in defaults.items() if name in _ARGUMENTS and getattr(request, name) is None}


def call_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the pipeline's `__call__`."""
    return inspect.signature(type(pipe).__call__).parameters


def call_arguments(pipe: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` by the names of the pipeline's `__call__`, as far as it takes them."""
    takes = call_parameters(pipe)
    named = {_ARGUMENTS[name]: value for name, value in values.items() if value is not None}
    return {name: value for name, value in named.items() if name in takes}


def _default(pipe: Any, takes: Mapping[str, inspect.Parameter], name: str) -> Any:
    argument = _ARGUMENTS[name]
    if argument not in takes:
        return 1 if name == "frames" else None
    default = takes[argument].default
    return _default_size(pipe, name) if default is None and name in ("height", "width", "frames") else default


def _default_size(pipe: Any, name: str) -> Any:
    """What CogVideoX and FLUX fill in themselves, from their configs."""
    config = pipe.transformer.config
    if name == "frames":
        return config.sample_frames
    if hasattr(pipe, "default_sample_size"):
        return pipe.default_sample_size * pipe.vae_scale_factor
    return getattr(config, f"sample_{name}") * pipe.vae_scale_factor_spatial


def _fill(asked: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return {name: defaults[name] if value is None else value for name, value in asked.items()}


def _demo_folder() -> Path | None:
    try:
        return demo_model_path().resolve()
    except FileNotFoundError:
        return None
