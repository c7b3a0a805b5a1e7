import os

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate.video import to_uint8, write_video


def _frames(height=48, width=64, count=7):
    """A bright square that moves over a gradient: smooth enough for a video codec."""
    y, x = np.mgrid[:height, :width]
    frames = np.stack([np.stack([x * 3, y * 4, x + y], -1)] * count).astype(np.uint8)
    for t in range(count):
        frames[t, 8:24, 4 * t : 4 * t + 16] = 230
    return frames


@pytest.mark.parametrize("size", [(48, 64), (47, 63), (16, 16)])
def test_mp4_plays_and_shows_the_frames(tmp_path, size):
    frames = _frames(*size)
    path = tmp_path / "a.mp4"
    write_video(frames, path, format="mp4", fps=16)
    with imageio.get_reader(path) as reader:
        meta = reader.get_meta_data()
        read = np.stack([frame for frame in reader])  # noqa: C416
    assert meta["codec"] == "h264"
    assert "yuv420p" in meta["pix_fmt"]
    assert meta["fps"] == 16
    assert read.shape == (7, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert np.abs(read[:, : size[0], : size[1]].astype(int) - frames).mean() < 6


def test_gif_keeps_size_count_and_speed(tmp_path):
    write_video(_frames(47, 63), tmp_path / "a.gif", format="gif", fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.size == (63, 47)
        assert image.n_frames == 7
        assert image.info["duration"] == 100


def test_png_is_lossless_and_replaces_an_older_folder(tmp_path):
    frames = _frames()
    write_video(np.concatenate([frames, frames]), tmp_path / "a", format="png", fps=16)
    write_video(frames, tmp_path / "a", format="png", fps=16)
    files = sorted((tmp_path / "a").iterdir())
    assert [file.name for file in files] == [f"{t:04d}.png" for t in range(7)]
    assert np.array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), frames)


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_single_frame(tmp_path, format):
    write_video(_frames(count=1), tmp_path / f"a.{format}", format=format, fps=16)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{format}"]


@pytest.mark.parametrize("format", ["mp4", "gif", "png"])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path, format, monkeypatch):
    path = tmp_path / f"a.{format}"
    path.write_text("old")

    def interrupt(*_):
        assert len(list(tmp_path.glob(".partial-*"))) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_video(_frames(), path, format=format, fps=16)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "old"


def test_refuses_what_are_no_frames(tmp_path):
    for frames in (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="frames must be uint8"):
            write_video(frames, tmp_path / "a.mp4", format="mp4", fps=16)
    with pytest.raises(ValueError, match="format must be"):
        write_video(_frames(), tmp_path / "a.avi", format="avi", fps=16)
    assert not list(tmp_path.iterdir())


def test_rounds_and_clips_to_uint8():
    assert to_uint8(np.array([-0.1, 0.0, 0.5, 1.0, 1.2])).tolist() == [0, 0, 128, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(np.array([np.nan]))
