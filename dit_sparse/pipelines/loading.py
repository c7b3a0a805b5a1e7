"""Loading a pipeline of a supported family, with every failure as one clear line."""

from __future__ import annotations

import inspect
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError

from dit_sparse.pipelines.adapter import FamilyAdapter
from dit_sparse.pipelines.families import FAMILIES, adapter_for
from dit_sparse.pipelines.installed import TRANSFORMERS

OFFLOADS = ("none", "model", "group")


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and why."""


def load_pipeline(
    model: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: str = "cpu", offload: str = "none"
) -> Any:
    """The dense pipeline in a folder or under a hub id, on `device`.

    Args:
        model: a folder in diffusers' format, or a hub id such as "Wan-AI/Wan2.1-T2V-1.3B-Diffusers".
        dtype: of the weights; Wan's VAE stays in float32, as diffusers recommends.
        device: a torch device.
        offload: "none", or diffusers' "model" or "group" offload, which need a GPU.

    Raises:
        ModelError: no such model, no diffusers model, an unsupported family, or damaged files.
        ValueError: an unknown offload or an unusable device.
    """
    _check_placement(device, offload)
    _check_folder(model)
    try:
        pipe = DiffusionPipeline.from_pretrained(os.fspath(model), dtype=dtype, use_safetensors=True)
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model {os.fspath(model)!r} has a damaged file: {_first_line(error)}") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {os.fspath(model)!r} cannot be loaded: {_first_line(error)}") from error
    try:
        adapter = adapter_for(pipe)
    except ValueError as error:
        raise ModelError(f"model {os.fspath(model)!r}: {error}") from error
    if adapter.float32_vae and dtype != torch.float32 and getattr(pipe, "vae", None) is not None:
        pipe.vae.to(torch.float32)
    try:
        return _place(pipe, device, offload)
    except (RuntimeError, NotImplementedError) as error:
        reason = "its weights do not fill the model that its config describes" if "meta tensor" in str(error) else ""
        raise ModelError(
            f"model {os.fspath(model)!r} cannot be put on {device}: {reason or _first_line(error)}"
        ) from error


@dataclass(frozen=True)
class UnloadedTransformer:
    """A transformer of which only the config is here, with the defaults of its class for what it leaves out."""

    adapter: FamilyAdapter
    config: SimpleNamespace


def unloaded_transformers(model: str | os.PathLike[str]) -> list[UnloadedTransformer]:
    """The transformers of a folder, or of a hub id as far as the hub's cache has them.

    Nothing is downloaded. What is missing or damaged is left out: `load_pipeline` says what is wrong with it.
    """
    found = []
    for name in TRANSFORMERS:
        with suppress(OSError, ValueError):
            config = _read_object(model, _file_here(model, f"{name}/config.json"))
            adapter = FAMILIES.get(str(config.get("_class_name")))
            if adapter is not None:
                takes = inspect.signature(getattr(diffusers, adapter.transformer_class)).parameters.values()
                config = {parameter.name: parameter.default for parameter in takes} | config
                found.append(UnloadedTransformer(adapter, SimpleNamespace(**config)))
    return found


def _file_here(model: str | os.PathLike[str], name: str) -> Path:
    """The file `name` of a folder or of the hub's cache; raises OSError or ValueError where there is none."""
    if Path(model).is_dir():
        return Path(model) / name
    path = try_to_load_from_cache(os.fspath(model), name)
    if not isinstance(path, str):
        raise FileNotFoundError(f"{name} of {os.fspath(model)!r} is not in the hub's cache")
    return Path(path)


def _place(pipe: Any, device: str, offload: str) -> Any:
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    if offload == "group":
        pipe.enable_group_offload(
            onload_device=torch.device(device), offload_device=torch.device("cpu"), offload_type="leaf_level"
        )
        return pipe
    return pipe.to(device)


def _check_placement(device: str, offload: str) -> None:
    if offload not in OFFLOADS:
        raise ValueError(f"offload must be one of {', '.join(OFFLOADS)}, got {offload!r}")
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch device such as cpu or cuda:0, got {device!r}") from error
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} needs an NVIDIA GPU and a CUDA build of torch, got torch {torch.__version__}"
        )
    if parsed.type == "cuda" and parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise ValueError(f"device must be below cuda:{torch.cuda.device_count()}, got {device!r}")
    if offload != "none" and parsed.type != "cuda":
        raise ValueError(f"offload {offload!r} needs a GPU to offload from, got device {device!r}; use offload none")


def _check_folder(model: str | os.PathLike[str]) -> None:
    """Say what is wrong with a local folder before diffusers guesses that it is a hub id."""
    path = Path(model)
    if path.is_file():
        raise ModelError(f"model must be a folder or a hub id, got the file {os.fspath(model)!r}")
    looks_local = os.fspath(model).startswith((".", "/", "~")) or os.fspath(model).count("/") != 1
    if not path.is_dir():
        if looks_local:
            raise ModelError(f"model must be an existing folder or a hub id owner/name, got {os.fspath(model)!r}")
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"model must be a diffusers folder with a model_index.json, got {os.fspath(model)!r} without one"
        )
    if "_class_name" not in _read_object(model, index):
        raise ModelError(f'model {os.fspath(model)!r} has a model_index.json without "_class_name"')
    for config in sorted(path.glob("*/config.json")):
        _read_object(model, config)


def _read_object(model: str | os.PathLike[str], path: Path) -> dict[str, Any]:
    """A config of the model: a JSON object."""
    name = path.relative_to(model) if path.is_relative_to(model) else path
    try:
        config = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"model {os.fspath(model)!r} has a damaged {name}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"model {os.fspath(model)!r} has a {name} that is no JSON object: {config!r:.40}")
    return config


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"
