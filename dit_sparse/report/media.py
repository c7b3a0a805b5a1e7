"""Videos and images as a page can show them: as they are where browsers play that, else encoded anew."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.generate.video import write_video

__all__ = ["Media", "prepare"]

_PLAYABLE = {"h264": ".mp4", "vp8": ".webm", "vp9": ".webm", "av1": ".mp4"}
"""Codecs that browsers play, with 4:2:0 colour, and what holds them."""

_TYPES = {".mp4": "video/mp4", ".webm": "video/webm", ".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Media:
    """A video or image for a page.

    Args:
        data: the bytes to embed; `None` where `path` can be linked to.
        type: of the data, such as "video/mp4".
        width, height, frames, fps: of what is shown; `frames` is 1 for an image.
        encoded: whether it was encoded anew.
    """

    path: Path
    data: bytes | None
    type: str
    width: int
    height: int
    frames: int
    fps: float
    encoded: bool = False

    @property
    def is_image(self) -> bool:
        return self.type.startswith("image/")

    @property
    def size(self) -> int:
        """Bytes that a page grows by."""
        return 0 if self.data is None else 4 * -(-len(self.data) // 3)

    def data_uri(self) -> str:
        """The data as one; only where there are any."""
        assert self.data is not None
        return f"data:{self.type};base64,{base64.b64encode(self.data).decode('ascii')}"


def prepare(path: Path, fps: float, *, link: bool = False) -> Media:
    """The video, image or folder of PNG frames at `path`.

    Args:
        fps: frames a second, where the file does not say.
        link: leave the bytes where they are, if browsers can play the file as it is.

    Raises:
        ValueError: no video that can be read.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _encode(path, _frames_of_folder(path), fps)
    if path.suffix.lower() in (".gif", ".png"):
        frames = _frames_of_image(path, fps)
        if len(frames) > 1:
            return _encode(path, frames, fps)
        height, width = frames[0].shape[:2]
        return Media(path, None if link else path.read_bytes(), _TYPES[path.suffix.lower()], width, height, 1, fps)
    facts = _facts(path)
    width, height = facts["source_size"]
    plays = _PLAYABLE.get(facts["codec"]) == path.suffix.lower() and facts["pix_fmt"].startswith("yuv420p")
    if not plays:
        return _encode(path, list(_decode(path)), facts["fps"])
    count = round(facts["duration"] * facts["fps"])
    data = None if link else path.read_bytes()
    return Media(path, data, _TYPES[path.suffix.lower()], width, height, count, facts["fps"])


def _facts(path: Path) -> dict[str, Any]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    try:
        facts = next(reader)
        next(reader)  # a file that was cut short still has its header
    except (OSError, RuntimeError, StopIteration, IndexError, KeyError):
        raise ValueError(f"{path} cannot be read as a video: make it again") from None
    finally:
        reader.close()
    return facts


def _decode(path: Path) -> Iterator[np.ndarray]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["source_size"]
    for frame in reader:
        yield np.frombuffer(frame, np.uint8).reshape(height, width, 3)


def _encode(path: Path, frames: list[np.ndarray], fps: float) -> Media:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        write_video(np.stack(frames), file, format="mp4", fps=round(fps))
        data = file.read_bytes()
    height, width = frames[0].shape[:2]
    # 4:2:0 has even sizes alone.
    return Media(path, data, "video/mp4", width + width % 2, height + height % 2, len(frames), round(fps), encoded=True)


def _frames_of_folder(path: Path) -> list[np.ndarray]:
    frames = [frame for file in sorted(path.glob("*.png")) for frame in _frames_of_image(file, 1)]
    if not frames:
        raise ValueError(f"{path} has no PNG frames: make it again")
    if len({frame.shape for frame in frames}) > 1:
        raise ValueError(f"{path} has frames of different sizes: make it again")
    return frames


def _frames_of_image(path: Path, fps: float) -> list[np.ndarray]:
    """Of a GIF all of them; equal ones after each other are written as one that lasts longer."""
    from PIL import Image, ImageSequence, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            frames = []
            for frame in ImageSequence.Iterator(image):
                pixels = np.asarray(frame.convert("RGB"))
                frames += [pixels] * max(1, round(frame.info.get("duration", 0) * fps / 1000))
            return frames
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read as an image: make it again") from None
