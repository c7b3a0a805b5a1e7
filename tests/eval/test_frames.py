"""Frames from folders, images and videos; what is lossless is told apart from what may not be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.eval.frames import read_clip
from tests.eval.videos import FRAMES, write_video


def write_folder(folder: Path, names: list[str], frames: np.ndarray = FRAMES) -> Path:
    folder.mkdir(exist_ok=True)
    for name, frame in zip(names, frames, strict=False):
        Image.fromarray(frame).save(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "source"),
    [
        ("a.mkv", "ffv1", "bgr0", "ffv1, bgr0"),
        ("a.avi", "huffyuv", "rgb24", "huffyuv, bgr0"),
        ("b.avi", "utvideo", "gbrp", "utvideo, gbrp"),
        ("a.mov", "png", "rgb24", "png, rgb24"),
    ],
)
def test_lossless_videos_come_back_bit_for_bit(tmp_path: Path, name: str, codec: str, pixels: str, source: str) -> None:
    clip = read_clip(write_video(tmp_path / name, codec, pixels))
    assert np.array_equal(clip.frames, FRAMES)
    assert (clip.source, clip.fps, clip.lossy) == (source, 16, False)


@pytest.mark.parametrize(
    ("name", "codec", "pixels", "source"),
    [
        ("a.mp4", "libx264", "yuv444p", "h264, yuv444p"),
        ("b.mp4", "libx264rgb", "rgb24", "h264, gbrp"),
        ("a.mkv", "ffv1", "yuv444p", "ffv1, yuv444p"),
    ],
)
def test_lossy_videos_are_refused_unless_allowed(
    tmp_path: Path, name: str, codec: str, pixels: str, source: str
) -> None:
    path = write_video(tmp_path / name, codec, pixels)
    with pytest.raises(ValueError, match=f"is {source}, which may have lost detail; give a folder of PNG files or an"):
        read_clip(path)
    clip = read_clip(path, allow_lossy=True)
    assert clip.lossy
    assert clip.frames.shape == FRAMES.shape
    assert not np.array_equal(clip.frames, FRAMES)


def test_a_folder_is_read_by_number(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", [f"frame{number}.png" for number in range(8, 13)])
    (folder / "notes.txt").write_text("x")
    clip = read_clip(folder)
    assert np.array_equal(clip.frames, FRAMES)
    assert (clip.source, clip.fps, clip.lossy) == ("5 PNG files", None, False)
    named = write_folder(tmp_path / "b", ["a.png", "b.png", "c1.png"])
    assert np.array_equal(read_clip(named).frames, FRAMES[:3])
    assert np.array_equal(read_clip(named / "b.png").frames, FRAMES[1:2])


def test_folders_that_are_no_clip(tmp_path: Path) -> None:
    gap = write_folder(tmp_path / "gap", ["0.png", "1.png", "3.png"])
    with pytest.raises(ValueError, match="holds frames 0 to 3, but frame 2 is missing"):
        read_clip(gap)
    with pytest.raises(ValueError, match="two PNG files of one number"):
        read_clip(write_folder(tmp_path / "twice", ["1.png", "01.png"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no PNG file"):
        read_clip(tmp_path / "empty")
    sizes = write_folder(tmp_path / "sizes", ["0.png"])
    write_folder(sizes, ["1.png"], FRAMES[:, :20])
    with pytest.raises(ValueError, match="frames of unlike size: 47x20, 47x33"):
        read_clip(sizes)
    for mode, pixels in (("RGBA", np.zeros((8, 8, 4), np.uint8)), ("L", np.zeros((8, 8), np.uint8))):
        Image.fromarray(pixels).save(tmp_path / "other.png")
        with pytest.raises(ValueError, match=f"must be an RGB image of 8 bits, got mode {mode}"):
            read_clip(tmp_path / "other.png")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "a.mkv", "ffv1", "bgr0").read_bytes()
    cases = {
        "garbage.mp4": (b"garbage" * 100, "cannot be read as a video"),
        "empty.mp4": (b"", "cannot be read as a video"),
        "head.mkv": (whole[:900], "cannot be read as a video"),
        "half.mkv": (whole[: len(whole) // 2], "is cut short: 2 frames could be read, and its header tells of 5"),
        "garbage.png": (b"garbage", "cannot be read as a PNG file"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_clip(tmp_path / name)
        assert "\n" not in str(error.value)
    Image.fromarray(FRAMES[0]).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    with pytest.raises(ValueError, match="cannot be read as a PNG file"):
        read_clip(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="no such video, image or folder"):
        read_clip(tmp_path / "nowhere.mp4")
