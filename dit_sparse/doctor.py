"""What of the toolkit works on this machine, what does not, and how to get it."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["diagnose"]

_REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_OPTIONAL = {"triton": "pip install dit-sparse[gpu]", "xformers": "pip install dit-sparse[xformers]"}
_COMPILERS = ("c++", "g++", "clang++")


def diagnose() -> dict[str, Any]:
    """Facts about this machine, ready for JSON.

    Returns:
        Versions, hardware, kernel backends (`None` where one is ready, else why not), and under "problems" what is
        missing and how to get it; "required" tells whether `generate` cannot run without it, "ready" whether it can.
    """
    report: dict[str, Any] = {
        "dit_sparse": _version("dit-sparse"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in (*_REQUIRED, *_OPTIONAL)},
        "cpu": {"name": _cpu_name(), "cores": os.cpu_count(), "ram_gib": _ram_gib()},
        "compiler": next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))), None),
        "ffmpeg": _ffmpeg(),
        "demo_model": _demo_model(),
        "gpus": [],
        "backends": {},
    }
    if report["versions"]["torch"] is not None:
        report |= _torch_facts()
    report["problems"] = _problems(report)
    report["ready"] = not any(problem["required"] for problem in report["problems"])
    return report


def _torch_facts() -> dict[str, Any]:
    import torch

    from dit_sparse.cost import costs_of
    from dit_sparse.kernels import BACKENDS

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "device": str(device),
        "costs": costs_of(device).source,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": {name: backend.unavailable(device) for name, backend in BACKENDS.items()},
    }


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _problems(report: dict[str, Any]) -> list[dict[str, Any]]:
    problems = [
        _problem(f"{name} is not installed", f"pip install {name}", required=True)
        for name in _REQUIRED
        if report["versions"][name] is None
    ]
    if not report["gpus"]:
        built = report.get("cuda") is not None
        fix = "check the NVIDIA driver with nvidia-smi" if built else "install a CUDA build of torch (pytorch.org)"
        problems.append(_problem("torch finds no GPU: attention runs on the CPU", f"on a machine with one, {fix}"))
    for name, fix in _OPTIONAL.items():
        # Neither has a use without a GPU.
        if report["gpus"] and report["versions"][name] is None:
            problems.append(_problem(f"{name} is not installed", fix))
    if report["compiler"] is None and not report["gpus"]:
        problems.append(_problem("no C++ compiler: FlexAttention cannot run on the CPU", "install g++ or set CXX"))
    if report["ffmpeg"] is None:
        problems.append(_problem("no ffmpeg: --format mp4 cannot be written", "pip install imageio[ffmpeg]"))
    if report["demo_model"] is None:
        problems.append(_problem("the demo model is missing: --model must be given", "reinstall dit-sparse"))
    if report["backends"] and all(report["backends"].values()):
        problems.append(_problem("no kernel backend is ready", "see the backends' own lines", required=True))
    return problems


def _problem(what: str, fix: str, *, required: bool = False) -> dict[str, Any]:
    return {"what": what, "fix": fix, "required": required}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _ram_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def _demo_model() -> str | None:
    from dit_sparse.demo import demo_model_path

    try:
        return str(demo_model_path())
    except FileNotFoundError:
        return None
