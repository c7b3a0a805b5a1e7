"""Finds the videos that are to be scored, decodes each once, and says what is wrong with them."""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.eval.flicker import temporal_flickering
from dit_sparse.vbench.files import file_hash, remembered
from dit_sparse.vbench.prompts import Prompt, Sample

__all__ = ["SUFFIXES", "Facts", "Found", "Video", "disagreements", "find_custom", "find_samples", "inspect"]

SUFFIXES = (".mp4", ".gif")
"""Kinds of files that VBench decodes; it compares the endings as they stand here."""


@dataclass(frozen=True)
class Video:
    """A file to be scored, and the prompt that it was made from."""

    path: Path
    prompt: Prompt


@dataclass
class Found:
    """The videos of a folder by their names without the ending.

    Args:
        missing: names of those that are not there.
        unusable: by name, what is wrong with those that are.
    """

    videos: dict[str, Video] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unusable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What decoding a file told: its hash, frames that could be decoded, their rate and size, and its flickering."""

    sha256: str
    frames: int
    fps: float
    width: int
    height: int
    flickering: float


def find_samples(folder: Path, samples: Sequence[Sample]) -> Found:
    """The files of `samples` in `folder`; every one has a suffix of its own.

    Raises:
        ValueError: no such folder.
    """
    by_stem, found = _by_stem(folder), Found()
    for sample in samples:
        # File systems differ in how they compose accents.
        paths = by_stem.get(unicodedata.normalize("NFC", sample.stem), [])
        if len(paths) > 1:
            found.unusable[sample.stem] = _several(sample.stem, paths)
        elif paths:
            found.videos[sample.stem] = Video(paths[0], sample.prompt)
        else:
            found.missing.append(sample.stem)
    return found


def find_custom(path: Path, prompts: Mapping[str, str] | None) -> Found:
    """The videos in the folder `path`, or the one file that it is.

    Args:
        prompts: prompts by file name; without it they are read from `manifest.jsonl` in the folder, or else from the
            names, where `-0`, `-1` and so on at the end are no part of them.

    Raises:
        ValueError: no such folder, or no video in it.
    """
    by_stem = {path.stem: [path]} if path.is_file() else _by_stem(path)
    if not by_stem:
        raise ValueError(f"{path} holds no videos ({', '.join(SUFFIXES)})")
    known = prompts if prompts is not None else _manifest_prompts(path if path.is_dir() else path.parent)
    found = Found()
    for stem, paths in sorted(by_stem.items()):
        name = paths[0].name
        if len(paths) > 1:
            found.unusable[stem] = _several(stem, paths)
        elif prompts is not None and name not in prompts:
            found.unusable[stem] = f"{name} has no prompt in the file of prompts"
        else:
            found.videos[stem] = Video(paths[0], Prompt(known.get(name, re.sub(r"-\d+$", "", stem)), (), {}))
    if prompts is not None:
        there = {path.name for paths in by_stem.values() for path in paths}
        found.missing += [name for name in prompts if name not in there]
    return found


def inspect(paths: Sequence[Path], cache: Path | None = None, workers: int = 1) -> Iterator[Facts | ValueError]:
    """Decode every file of `paths` wholly and say what is in it, in order; an error stands for one that is unusable.

    Args:
        cache: folder that remembers the facts of files by path, size and time, so that each is decoded once.
    """
    # FFmpeg would tell of every file that it cannot read, too.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda path: _inspect(path, cache), paths)


def disagreements(facts: Mapping[str, Facts]) -> list[str]:
    """A line for every video by name whose rate, frames or size is not that of most."""
    lines = []
    for what, values in (
        ("fps", {name: round(fact.fps, 3) for name, fact in facts.items()}),
        ("frames", {name: fact.frames for name, fact in facts.items()}),
        ("size", {name: f"{fact.width}x{fact.height}" for name, fact in facts.items()}),
    ):
        if not values:
            continue
        (usual, count), *_ = Counter(values.values()).most_common(1)
        lines += [
            f"{name}: {what} {value}, where {count} of {len(values)} videos have {usual}"
            for name, value in values.items()
            if value != usual
        ]
    return lines


def _by_stem(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise ValueError(f"no such folder of videos: {folder}")
    stems: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
            stems.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    return stems


def _several(stem: str, paths: Iterable[Path]) -> str:
    return f"several videos of the name {stem!r}: {', '.join(path.name for path in paths)}; keep one"


def _manifest_prompts(folder: Path) -> dict[str, str]:
    path = folder / "manifest.jsonl"
    prompts: dict[str, str] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            prompts[str(entry["file"])] = str(entry["prompt"])
        except (ValueError, KeyError, TypeError):
            continue
    return prompts


def _inspect(path: Path, cache: Path | None) -> Facts | ValueError:
    try:
        return Facts(**remembered(path, cache, _decode))
    except OSError as error:
        return ValueError(f"{path.name}: cannot be read: {error.strerror}")
    except ValueError as error:
        return error


def _decode(path: Path) -> dict[str, Any]:
    import cv2

    if not path.stat().st_size:
        raise ValueError(f"{path.name}: the file is empty")
    sha256 = file_hash(path)
    video = cv2.VideoCapture(str(path))
    try:
        if not video.isOpened():
            raise ValueError(f"{path.name}: no video that can be decoded")
        fps, announced = video.get(cv2.CAP_PROP_FPS), round(video.get(cv2.CAP_PROP_FRAME_COUNT))
        counter = _Counter(video)
        try:
            flickering = temporal_flickering(counter)
        except ValueError:
            raise ValueError(f"{path.name}: {counter.frames} frames can be decoded; two are needed") from None
    finally:
        video.release()
    # VBench takes what comes before the first frame that cannot be decoded for the whole video.
    if counter.frames < announced:
        raise ValueError(f"{path.name}: cut short, {counter.frames} of {announced} frames can be decoded")
    if not (math.isfinite(fps) and 0 < fps <= 1000):
        raise ValueError(f"{path.name}: its frame rate must be above 0 and at most 1000, got {fps}")
    return asdict(Facts(sha256, counter.frames, float(fps), counter.width, counter.height, flickering))


class _Counter:
    """The frames of an opened video, counted as they pass."""

    def __init__(self, video: Any) -> None:
        self._video = video
        self.frames = self.width = self.height = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        while True:
            whole, frame = self._video.read()
            if not whole:
                return
            self.frames += 1
            self.height, self.width = frame.shape[:2]
            yield frame
