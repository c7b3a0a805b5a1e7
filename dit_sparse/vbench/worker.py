"""Scores videos by one dimension in VBench's own environment: `python -I worker.py JOB.json`.

Imports nothing of dit-sparse, which is not installed there. One call of VBench's own function a video, so that each
score is on the disk as soon as it is known and a video that fails costs no other; the models are loaded once.
A line of JSON on standard output tells of every video. Leaves with 0, or with 3 where videos failed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import math
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

Score = Callable[[dict[str, Any]], dict[str, Any]]

SOME_FAILED = 3
PACKAGES = ("vbench", "torch", "torchvision", "numpy", "opencv-python", "opencv-python-headless", "decord")
FILTER = "static_filter"

# What loads a dimension's models, as its module names them; a method stands before its class.
LOADERS = {
    "aesthetic_quality": ["get_aesthetic_model", "clip.load"],
    "appearance_style": ["clip.load"],
    "background_consistency": ["clip.load"],
    "color": ["DenseCaptioning.initialize_model", "DenseCaptioning"],
    "dynamic_degree": ["DynamicDegree"],
    "human_action": ["create_model", "torch.load"],
    "imaging_quality": ["MUSIQ"],
    "motion_smoothness": ["MotionSmoothness"],
    "multiple_objects": ["DenseCaptioning.initialize_model_det", "DenseCaptioning"],
    "object_class": ["DenseCaptioning.initialize_model_det", "DenseCaptioning"],
    "overall_consistency": ["ViCLIP"],
    "scene": ["tag2text_caption"],
    "spatial_relationship": ["DenseCaptioning.initialize_model_det", "DenseCaptioning"],
    "subject_consistency": ["torch.hub.load"],
    "temporal_style": ["ViCLIP"],
}
# What counts the frames that a dimension has seen, where it does not say so itself.
READERS = ("load_video", "get_frames")
# What uses none of the operators that torchvision has compiled.
NO_OPERATORS = ("temporal_flickering", "dynamic_degree", FILTER)
# What is defined in a library lasts as long as the library.
LIBRARIES: list[Any] = []
DOWNLOADERS = ("wget", "git", "curl", "unzip")


def main(path: str) -> int:
    events = _own_output()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    _leave_with_parent()
    sys.addaudithook(_no_downloads)
    score = _scorer(job, Path(path).parent)
    versions = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    failed = False
    for video in job["videos"]:
        event = {"name": video["name"]}
        # VBench can fail on a video in any way, and the others are still wanted.
        try:
            _write(video, video["record"] | {"device": job["device"], "versions": versions} | score(video))
        except Exception as error:  # noqa: BLE001
            event["error"] = f"{type(error).__name__}: {error}".strip(": ")
            failed = True
        events.write(json.dumps(event) + "\n")
        events.flush()
    return SOME_FAILED if failed else 0


def _own_output() -> TextIO:
    """Standard output for the events alone: what VBench prints goes to standard error."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


def _leave_with_parent() -> None:
    """End this process when the one that started it, which holds the other end of standard input, is gone."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _no_downloads(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse connections and the programs by which VBench fetches weights."""
    if event == "subprocess.Popen":
        command = arguments[1]
        first = str(command[0] if isinstance(command, (list, tuple)) else command).split(" ")[0]
        if os.path.basename(first) in DOWNLOADERS:
            raise PermissionError(f"VBench would run {first} to fetch a file that it lacks; use --allow-download")
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError("VBench would fetch a file that it lacks; use --allow-download")


def _scorer(job: dict[str, Any], scratch: Path) -> Score:
    import torch

    device = torch.device(job["device"])
    if job["dimension"] in NO_OPERATORS:
        torchvision_without_operators()
    if job["dimension"] == FILTER:
        return static_filter(device)
    return _dimension(job["dimension"], device, scratch)


def _dimension(name: str, device: Any, scratch: Path) -> Score:
    from vbench.utils import init_submodules

    module = importlib.import_module(f"vbench.{name}")
    submodules = init_submodules([name], local=True)[name]
    if name == "subject_consistency":
        _give_dino_its_weights(submodules["path"], scratch / "torch")
    for loader in LOADERS.get(name, ()):
        _load_once(module, loader)
    seen: list[int] = []
    for reader in READERS:
        if hasattr(module, reader):
            setattr(module, reader, _counting(getattr(module, reader), seen))
    compute = getattr(module, f"compute_{name}")

    def score(video: dict[str, Any]) -> dict[str, Any]:
        seen.clear()
        entry = {
            "prompt_en": video["prompt"],
            "dimension": [name],
            "video_list": [video["path"]],
            "auxiliary_info": video["auxiliary"],
        }
        info = scratch / "info.json"
        info.write_text(json.dumps([entry]), encoding="utf-8")
        try:
            _, results = compute(str(info), device, submodules)
        except ZeroDivisionError:
            # Colour has no score for a video in which its object is in no frame.
            if name != "color":
                raise
            return {"score": None, "details": {}, "frames": None}
        if len(results) != 1:
            raise ValueError("VBench could not decode it and left it out")
        details = _plain({key: value for key, value in results[0].items() if key != "video_path"})
        value = float(details.pop("video_results"))
        if not math.isfinite(value):
            raise ValueError(f"VBench gave {value}")
        return {"score": value, "details": details, "frames": seen[-1] if seen else None}

    return score


def static_filter(device: Any) -> Score:
    import torch
    from easydict import EasyDict
    from vbench.cli import static_filter as upstream
    from vbench.utils import CACHE_DIR

    upstream.DEVICE = device
    # The weights were saved on a GPU.
    upstream.torch.load = functools.partial(torch.load, map_location=device)
    model = f"{CACHE_DIR}/raft_model/models/raft-things.pth"
    arguments = EasyDict(model=model, small=False, mixed_precision=False, alternate_corr=False)
    judge = upstream.StaticFilter(arguments, device=device)
    return lambda video: {"score": float(judge.infer(video["path"])), "details": {}, "frames": None}


def torchvision_without_operators() -> None:
    """Let torchvision be imported beside a torch that it was not built for, where none of its operators is used."""
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            LIBRARIES[-1].define(schema)


def _give_dino_its_weights(path: str, home: Path) -> None:
    """Put the weights where torch.hub looks: DINO's own code ignores the path that VBench gives it."""
    checkpoints = home / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / Path(path).name).symlink_to(path)
    os.environ["TORCH_HOME"] = str(home)


def _load_once(module: Any, name: str) -> None:
    """Make `name` of `module` give what it gave at its first call: models are loaded alike for every video."""
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, module)
    load = getattr(owner, last)
    loaded: list[Any] = []

    def once(*arguments: Any, **options: Any) -> Any:
        if not loaded:
            loaded.append(load(*arguments, **options))
        return loaded[0]

    setattr(owner, last, once)


def _counting(reader: Callable[..., Any], seen: list[int]) -> Callable[..., Any]:
    @functools.wraps(reader)
    def counted(*arguments: Any, **options: Any) -> Any:
        frames = reader(*arguments, **options)
        seen.append(len(frames))
        return frames

    return counted


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.item() if hasattr(value, "item") else value


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _write(video: dict[str, Any], value: dict[str, Any]) -> None:
    path, partial = Path(video["out"]), Path(video["partial"])
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
