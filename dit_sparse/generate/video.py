"""Writes frames to a video or image file; what is not finished never bears the final name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dit_sparse.partials import partial_path, place, remove

__all__ = [
    "check_writer",
    "extension",
    "to_uint8",
    "write_partial",
    "write_video",
]


def extension(format: str, frames: int) -> str:
    """Ending of a file name in `format`; a folder of several frames has none."""
    return "" if format == "png" and frames > 1 else f".{format}"


def check_writer(format: str) -> None:
    """Make sure that `format` can be written here.

    Raises:
        ValueError: mp4 without an ffmpeg.
    """
    if format != "mp4":
        return
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise ValueError("--format mp4 needs ffmpeg: pip install imageio[ffmpeg], or use --format gif or png") from None


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames `[T, H, W, 3]` of floats in [0, 1] as uint8, rounded.

    Raises:
        ValueError: NaN or infinite values.
    """
    if not np.isfinite(frames).all():
        raise ValueError("the model gave frames with NaN or infinite values (another --dtype may help)")
    return (frames.clip(0, 1) * 255).round().astype(np.uint8)


def write_video(frames: np.ndarray, path: Path, *, format: str, fps: int) -> None:
    """Write `frames` `[T, H, W, 3]` uint8 to `path`, under another name until it is whole.

    Args:
        path: the file, or the folder for several frames in "png"; what is there is replaced.
        format: "mp4" (H.264, 4:2:0, which plays everywhere), "gif" or "png".

    Raises:
        ValueError: frames of another shape or dtype, or an unknown format.
        OSError: the file cannot be written.
    """
    partial = partial_path(path)
    write_partial(frames, partial, format=format, fps=fps)
    place(partial, path)


def write_partial(frames: np.ndarray, partial: Path, *, format: str, fps: int) -> None:
    """The first half of `write_video`: write everything to `partial`, of which a failure leaves nothing."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    writers = {"mp4": _write_mp4, "gif": _write_gif, "png": _write_png}
    if format not in writers:
        raise ValueError(f"format must be one of {', '.join(writers)}, got {format!r}")
    remove(partial)
    try:
        writers[format](frames, partial, fps)
    except BaseException:
        remove(partial)
        raise


def _write_mp4(frames: np.ndarray, path: Path, fps: int) -> None:
    import imageio.v2 as imageio

    # 4:2:0 stores one colour for 2x2 pixels, so odd sizes get one more row or column.
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    writer: Any = imageio.get_writer(
        path,
        format="FFMPEG",
        mode="I",
        fps=fps,
        codec="libx264",
        pixelformat="yuv420p",
        quality=None,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-crf", "18", "-movflags", "+faststart"],
    )
    with writer:
        for frame in frames:
            writer.append_data(frame)
    if not path.is_file() or not path.stat().st_size:
        raise OSError(f"ffmpeg could not write {path.name}")


def _write_gif(frames: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)


def _write_png(frames: np.ndarray, path: Path, fps: int) -> None:
    from PIL import Image

    if len(frames) == 1:
        Image.fromarray(frames[0]).save(path, format="PNG")
        return
    path.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{number:04d}.png")
