"""Reads the frames of folders of PNG files, images and videos, and knows which of them have lost something."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["LOSSLESS_CODECS", "Clip", "read_clip"]

LOSSLESS_CODECS = ("ffv1", "huffyuv", "ffvhuff", "utvideo", "png", "apng", "rawvideo", "qtrle")
"""Video codecs that give back what was put in; others may, but their files do not say so."""

_RGB_FORMATS = re.compile(r"^(rgb|bgr|gbr|argb|abgr|0rgb|0bgr)")
_NUMBER = re.compile(r"(\d+)$")


@dataclass(frozen=True)
class Clip:
    """Frames from a file.

    Args:
        frames: `[T, H, W, 3]` uint8.
        fps: frames a second; `None` for images, which have no speed.
        source: what the frames were read from, such as "30 PNG files" or "ffv1, bgr0".
        lossy: whether the file may have lost detail.
    """

    frames: np.ndarray
    fps: float | None
    source: str
    lossy: bool = False


def read_clip(path: Path, *, allow_lossy: bool = False) -> Clip:
    """The frames of `path`: a folder of PNG files in the order of their numbers, one PNG file, or a video.

    A video is taken as lossless if its codec is one of `LOSSLESS_CODECS` and its pixels are RGB: frames are made in
    RGB, and even a lossless codec rounds where it stores YUV. H.264 can be lossless, but its file does not say so.

    Args:
        allow_lossy: read others too; figures of them measure the codec with the method.

    Raises:
        ValueError: no such file, no frame, frames of unlike size, a frame that is missing among numbered ones, what
            cannot be decoded, or a lossy file.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"no such video, image or folder: {path}")
    if path.suffix.lower() == ".png":
        return Clip(_read_png(path)[None], None, "one PNG file")
    return _read_video(path, allow_lossy)


def _read_folder(folder: Path) -> Clip:
    files = [path for path in folder.iterdir() if path.suffix.lower() == ".png" and not path.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder} holds no PNG file: give a folder of frames such as 0000.png, 0001.png")
    frames = [_read_png(path) for path in _in_order(files)]
    return Clip(_stack(frames, folder), None, f"{len(frames)} PNG files")


def _in_order(files: Sequence[Path]) -> list[Path]:
    """By the number at the end of each name, of which none may be missing or double; by name where one has none."""
    numbers = [_NUMBER.search(path.stem) for path in files]
    if not all(numbers):
        return sorted(files)
    by_number = {int(number[1]): path for number, path in zip(numbers, files, strict=True) if number}
    if len(by_number) < len(files):
        raise ValueError(f"{files[0].parent} holds two PNG files of one number: which frames are meant is not clear")
    first, last = min(by_number), max(by_number)
    for number in range(first, last):
        if number not in by_number:
            raise ValueError(f"{files[0].parent} holds frames {first} to {last}, but frame {number} is missing")
    return [by_number[number] for number in sorted(by_number)]


def _read_png(path: Path) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a PNG file: {_reason(error)}") from None
    if mode != "RGB" or pixels.dtype != np.uint8:
        raise ValueError(f"{path} must be an RGB image of 8 bits, got mode {mode}")
    return pixels


def _read_video(path: Path, allow_lossy: bool) -> Clip:
    import imageio.v2 as imageio

    try:
        reader: Any = imageio.get_reader(path, format="FFMPEG")
        with reader:
            meta: dict[str, Any] = reader.get_meta_data()
            source, lossy = _source(meta)
            if lossy and not allow_lossy:
                raise _Lossy(f"{path} is {source}, which may have lost detail; {_HOW}")
            # `list` would ask for the length, which is infinite.
            frames = [frame for frame in reader]  # noqa: C416
    except _Lossy as error:
        raise ValueError(str(error)) from None
    # imageio and ffmpeg tell a damaged file by many kinds of error.
    except Exception as error:  # noqa: BLE001
        raise ValueError(f"{path} cannot be read as a video: {_reason(error)}") from None
    if not frames:
        raise ValueError(f"{path} holds no frame")
    # A header's duration is rounded to 10 ms, and sound may last a little longer.
    promised = float(meta.get("duration") or 0) * float(meta["fps"])
    if len(frames) < 0.95 * promised - 1:
        raise ValueError(
            f"{path} is cut short: {len(frames)} frames could be read, and its header tells of {promised:.0f}"
        )
    return Clip(_stack(frames, path), float(meta["fps"]), source, lossy)


class _Lossy(Exception):
    pass


_HOW = (
    f"give a folder of PNG files or an RGB video of a lossless codec ({', '.join(LOSSLESS_CODECS[:4])}, ...), "
    "or --allow-lossy (in Python allow_lossy=True)"
)


def _source(meta: dict[str, Any]) -> tuple[str, bool]:
    codec, pixels = str(meta.get("codec", "")), str(meta.get("pix_fmt", ""))
    # imageio passes on ffmpeg's whole description, such as "bgr0(pc, gbr/unknown/unknown".
    codec, pixels = (text.split("(")[0].strip(" ,") for text in (codec, pixels))
    return f"{codec}, {pixels}", not (codec in LOSSLESS_CODECS and _RGB_FORMATS.match(pixels))


def _stack(frames: Sequence[np.ndarray], path: Path) -> np.ndarray:
    sizes = sorted({f"{frame.shape[1]}x{frame.shape[0]}" for frame in frames})
    if len(sizes) > 1:
        raise ValueError(f"{path} holds frames of unlike size: {', '.join(sizes)}")
    return np.stack(frames)


def _reason(error: Exception) -> str:
    # ffmpeg's own log may follow on further lines.
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__
