import unicodedata
from pathlib import Path

import numpy as np
import pytest

from dit_sparse.eval.flicker import temporal_flickering
from dit_sparse.vbench.prompts import Prompt, Sample
from dit_sparse.vbench.videos import disagreements, find_custom, find_samples, inspect
from tests.vbench.standin import make_videos

SAMPLES = [Sample(Prompt("a façade", (), {}), index) for index in range(5)]


def test_one_video_of_five_is_not_enough(tmp_path):
    make_videos(tmp_path, "a façade-2.mp4")
    found = find_samples(tmp_path, SAMPLES)
    assert list(found.videos) == ["a façade-2"]
    assert found.missing == [f"a façade-{index}" for index in (0, 1, 3, 4)]


def test_each_video_has_its_own_suffix(tmp_path):
    make_videos(tmp_path, "a façade-0.gif", "a façade-1.mp4")
    (tmp_path / "0.txt").touch()
    found = find_samples(tmp_path, SAMPLES[:2])
    assert [video.path.suffix for video in found.videos.values()] == [".gif", ".mp4"]
    assert not found.missing


def test_two_videos_of_one_name(tmp_path):
    make_videos(tmp_path, "a façade-0.gif", "a façade-0.mp4")
    found = find_samples(tmp_path, SAMPLES[:1])
    assert found.unusable == {
        "a façade-0": "several videos of the name 'a façade-0': a façade-0.gif, a façade-0.mp4; keep one"
    }
    assert not found.videos
    assert find_custom(tmp_path, None).unusable.keys() == {"a façade-0"}


def test_accents_may_be_composed_in_either_way(tmp_path):
    make_videos(tmp_path, unicodedata.normalize("NFD", "a façade-0.mp4"))
    assert not find_samples(tmp_path, SAMPLES[:1]).missing


def test_no_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder of videos"):
        find_samples(tmp_path / "none", SAMPLES)
    with pytest.raises(ValueError, match="holds no videos"):
        find_custom(tmp_path, None)


def test_prompts_of_other_videos(tmp_path):
    make_videos(tmp_path, "a ball-3.mp4", "b.mp4")
    prompts = {name: video.prompt.text for name, video in find_custom(tmp_path, None).videos.items()}
    assert prompts == {"a ball-3": "a ball", "b": "b"}
    (tmp_path / "manifest.jsonl").write_text('{"file": "b.mp4", "prompt": "a big ball"}\n{"file"')
    assert find_custom(tmp_path, None).videos["b"].prompt.text == "a big ball"
    assert find_custom(tmp_path / "b.mp4", None).videos["b"].prompt.text == "a big ball"
    found = find_custom(tmp_path, {"b.mp4": "given", "c.mp4": "not there"})
    assert found.videos["b"].prompt.text == "given"
    assert found.missing == ["c.mp4"]
    assert found.unusable == {"a ball-3": "a ball-3.mp4 has no prompt in the file of prompts"}


def test_looks_into_a_video_once(tmp_path, monkeypatch):
    make_videos(tmp_path / "videos", "a.mp4", frames=4, fps=8, size=32)
    path, cache = tmp_path / "videos" / "a.mp4", tmp_path / "cache"
    (fact,) = inspect([path], cache)
    assert (fact.frames, fact.fps, fact.width, fact.height) == (4, 8, 32, 32)
    assert 0.4 < fact.flickering < 0.9
    monkeypatch.setattr("dit_sparse.vbench.videos._decode", lambda path: pytest.fail("decoded again"))
    assert list(inspect([path], cache)) == [fact]
    monkeypatch.undo()
    make_videos(tmp_path / "videos", "b.mp4", "a.mp4")
    (changed,) = inspect([path], cache)
    assert changed.sha256 != fact.sha256


def _cut(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_says_what_is_wrong_with_a_video(tmp_path):
    names = ["empty.mp4", "text.mp4", "one.mp4", "cut.mp4", "none.mp4"]
    paths = [tmp_path / name for name in names]
    paths[0].touch()
    paths[1].write_text("no video")
    make_videos(tmp_path, "one.mp4", frames=1)
    make_videos(tmp_path, "cut.mp4", frames=17, size=64)
    _cut(paths[3], 0.6)
    lines = [str(fact) for fact in inspect(paths)]
    assert lines[0] == "empty.mp4: the file is empty"
    assert lines[1] == "text.mp4: no video that can be decoded"
    assert lines[2] == "one.mp4: 1 frames can be decoded; two are needed"
    # The end is missing, and OpenCV says nothing of it; VBench would score what is left.
    assert lines[3].startswith("cut.mp4: cut short, ")
    assert lines[3].endswith(" of 17 frames can be decoded")
    assert lines[4] == "none.mp4: cannot be read: No such file or directory"


def test_videos_of_another_rate_length_or_size(tmp_path):
    make_videos(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    make_videos(tmp_path, "fast.mp4", fps=24)
    make_videos(tmp_path, "long.mp4", frames=5)
    make_videos(tmp_path, "large.mp4", size=32)
    paths = sorted(tmp_path.iterdir())
    facts = {path.stem: fact for path, fact in zip(paths, inspect(paths), strict=True)}
    assert disagreements(facts) == [
        "fast: fps 24.0, where 5 of 6 videos have 8.0",
        "long: frames 5, where 5 of 6 videos have 3",
        "large: size 32x32, where 5 of 6 videos have 16x16",
    ]


def test_flickering_is_a_mean_of_differences():
    frames = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3)).astype(np.uint8)
    expected = 1 - np.abs(np.diff(frames.astype(np.float64), axis=0)).mean() / 255
    assert temporal_flickering(frames) == pytest.approx(expected, abs=1e-7)
    assert temporal_flickering(frames[[0, 0, 0]]) == 1
    with pytest.raises(ValueError, match="at least two"):
        temporal_flickering(frames[:1])
    with pytest.raises(ValueError, match="uint8 of one shape, got float64"):
        temporal_flickering(frames.astype(np.float64))
    with pytest.raises(ValueError, match=r"got uint8 \[6, 6, 3\] after \[6, 7, 3\]"):
        temporal_flickering([frames[0], frames[0, :, :6]])
