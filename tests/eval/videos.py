"""A clip of noise, and files of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import numpy as np

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), dtype=np.uint8)


def write_video(path: Path, codec: str, pixels: str, fps: int = 16) -> Path:
    options: dict[str, Any] = {"codec": codec, "pixelformat": pixels, "quality": None, "macro_block_size": 1}
    writer: Any = imageio.get_writer(path, format="FFMPEG", mode="I", fps=fps, ffmpeg_log_level="error", **options)
    with writer:
        for frame in FRAMES:
            writer.append_data(frame)
    return path
