"""What a page can play is taken as it is; everything else is encoded anew and stays what it was."""

from __future__ import annotations

import base64
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate.video import write_video
from dit_sparse.report.media import prepare
from tests.report.conftest import counting_video

LEVELS = range(20, 200, 20)


@pytest.fixture
def frames() -> np.ndarray:
    return np.stack([np.full((34, 50, 3), level, np.uint8) for level in LEVELS])


def _levels(data: bytes, tmp_path: Path) -> list[float]:
    file = tmp_path / "found.mp4"
    file.write_bytes(data)
    return [frame.mean() for frame in imageio.get_reader(file)]


def test_an_mp4_is_embedded_as_it_is(frames, tmp_path) -> None:
    write_video(frames, tmp_path / "a.mp4", format="mp4", fps=12)
    media = prepare(tmp_path / "a.mp4", fps=99)
    assert (media.width, media.height, media.frames, media.fps) == (50, 34, 9, 12)
    assert media.data == (tmp_path / "a.mp4").read_bytes()
    assert not media.encoded
    head, data = media.data_uri().split(",")
    assert head == "data:video/mp4;base64"
    assert base64.b64decode(data) == media.data
    assert media.size == len(data)
    assert prepare(tmp_path / "a.mp4", fps=99, link=True).size == 0


@pytest.mark.parametrize("kind", ["png", "gif", "lossless"])
def test_others_are_encoded(frames, tmp_path, kind) -> None:
    if kind == "lossless":
        path = tmp_path / "a.mkv"
        with imageio.get_writer(path, codec="ffv1", fps=12, pixelformat="bgr0", macro_block_size=1) as writer:
            for frame in frames:
                writer.append_data(frame)
    else:
        path = tmp_path / f"a{'.gif' if kind == 'gif' else ''}"
        write_video(frames, path, format=kind, fps=12)
    media = prepare(path, fps=12, link=True)
    assert media.encoded
    assert (media.width, media.height, media.frames, media.fps) == (50, 34, 9, 12)
    np.testing.assert_allclose(_levels(media.data, tmp_path), LEVELS, atol=3)


def test_frames_alike_in_a_gif_are_all_there(tmp_path) -> None:
    write_video(np.full((9, 16, 16, 3), 90, np.uint8), tmp_path / "a.gif", format="gif", fps=16)
    assert prepare(tmp_path / "a.gif", fps=16).frames == 9
    moving = np.full((9, 16, 16, 3), 90, np.uint8)
    moving[6:] = 200
    write_video(moving, tmp_path / "b.gif", format="gif", fps=16)
    assert prepare(tmp_path / "b.gif", fps=16).frames == 9


def test_an_image_is_no_video(tmp_path) -> None:
    Image.new("RGB", (31, 17)).save(tmp_path / "a.png")
    media = prepare(tmp_path / "a.png", fps=16)
    assert (media.width, media.height, media.frames, media.is_image) == (31, 17, 1, True)


def test_odd_sizes_become_even(tmp_path) -> None:
    write_video(np.zeros((3, 33, 51, 3), np.uint8), tmp_path / "a", format="png", fps=12)
    media = prepare(tmp_path / "a", fps=12)
    assert (media.width, media.height) == (52, 34)


def _cut(path: Path) -> Path:
    counting_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 10])
    return path


def _text(path: Path) -> Path:
    path.write_text("no video")
    return path


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (_cut, "a.mp4", "cannot be read as a video"),
        (_text, "a.mp4", "cannot be read as a video"),
        (_text, "a.gif", "cannot be read as an image"),
        (lambda path: path.mkdir() or path, "a", "has no PNG frames"),
        (lambda path: path.touch() or path, "a.mp4", "cannot be read as a video"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, make, name, message) -> None:
    path = make(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        prepare(path, fps=16)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_frames_of_different_sizes_are_named(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    for size in (16, 32):
        Image.new("RGB", (size, 16)).save(tmp_path / "a" / f"{size}.png")
    with pytest.raises(ValueError, match="different sizes"):
        prepare(tmp_path / "a", fps=16)
