"""The videos that VBench asks for, made by the project's generation with a tiny model."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from dit_sparse.generate import Request, prepare, run
from dit_sparse.vbench.clips import custom_samples, parse_shard, shard_clips
from dit_sparse.vbench.prompts import Prompt, Sample
from dit_sparse.vbench.videos import find_samples, inspect
from tests.pipelines.tiny import make_tiny_wan
from tests.processes import FORKSERVER, left_by

ADASPA = {"method": "adaspa", "density": 0.3, "block": 8, "warmup": 0.0}
SAMPLES = [Sample(Prompt(text, (), {}), index) for text in ("a red cup", "a façade") for index in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_wan(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def request_for(model, tmp_path):
    def make(clips, **changes):
        values = {"config": ADASPA, "out": tmp_path / "out", "model": model, "device": "cpu", "format": "mp4"}
        sizes = {"height": 64, "width": 64, "frames": 5, "steps": 1, "guidance": 5.0}
        prompts = tuple(dict.fromkeys(clip.prompt for clip in clips))
        return Request(prompts=prompts, clips=tuple(clips), **(values | sizes | changes))

    return make


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".mp4")


def test_shards_divide_the_videos():
    clips = shard_clips(SAMPLES, seed=7)
    assert [(clip.stem, clip.seed) for clip in clips] == [
        ("a red cup-0", 7),
        ("a red cup-1", 8),
        ("a façade-0", 7),
        ("a façade-1", 8),
    ]
    parts = [shard_clips(SAMPLES, 7, (part, 3)) for part in (1, 2, 3)]
    assert sorted(clip.stem for part in parts for clip in part) == sorted(clip.stem for clip in clips)
    assert all(parts)


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/0", "1/2/3", "a/b", "1.0/2"])
def test_refuses_what_is_no_shard(text):
    with pytest.raises(ValueError, match="--shard must be such as 2/8"):
        parse_shard(text)
    assert parse_shard("2/8") == (2, 8)


def test_prompts_that_make_no_file_name_are_numbered():
    texts = ["a red ball", "either/or", "x" * 300, ".hidden"]
    stems = [clip.stem for clip in shard_clips(custom_samples(texts), 0)]
    assert len(set(stems)) == len(stems) == 20
    assert stems[:2] == ["a red ball-0", "a red ball-1"]
    assert stems[5] == "0002-either-or-seed0"
    assert stems[10].startswith("0003-xxx")
    assert stems[19] == "0004-hidden-seed4"
    with pytest.raises(ValueError, match="stands there twice: 'a'"):
        custom_samples(["a", "b", "a"])


def test_makes_every_video_once_under_its_official_name(request_for, tmp_path):
    first = request_for(shard_clips(SAMPLES, 0, (1, 2)))
    run(prepare(first))
    assert _names(tmp_path / "out") == ["a façade-0.mp4", "a red cup-0.mp4"]
    outcome = run(prepare(request_for(shard_clips(SAMPLES, 0))))
    assert [line["file"] for line in outcome.lines] == ["a red cup-1.mp4", "a façade-1.mp4"]
    found = find_samples(tmp_path / "out", SAMPLES)
    assert not found.missing
    facts = list(inspect([video.path for video in found.videos.values()]))
    assert len({fact.sha256 for fact in facts}) == 4
    assert {fact.frames for fact in facts} == {5}
    assert prepare(request_for(shard_clips(SAMPLES, 0))).todo == ()


def test_videos_of_other_settings_are_not_mixed(request_for, tmp_path):
    clips = shard_clips(SAMPLES[:1], 0)
    run(prepare(request_for(clips)))
    other = request_for(clips, config=ADASPA | {"density": 0.5})
    with pytest.raises(OSError, match=r"a red cup-0.mp4 in .* was made with other settings; use another --out"):
        prepare(other)
    # Neither is a video that was made with them counted when its file is gone.
    (tmp_path / "out" / "a red cup-0.mp4").unlink()
    with pytest.raises(OSError, match="was made with other settings"):
        prepare(other)
    (tmp_path / "out" / "a red cup-1.mp4").touch()
    with pytest.raises(OSError, match=r"a red cup-1.mp4 in .* is not in the manifest.jsonl there"):
        prepare(request_for(shard_clips(SAMPLES[1:2], 0)))


def test_a_video_of_another_name_does_not_count(request_for, tmp_path):
    clips = shard_clips(SAMPLES[:1], 0)
    run(prepare(request_for([replace(clips[0], name=None)])))
    assert _names(tmp_path / "out") == ["0001-a-red-cup-seed0.mp4"]
    run(prepare(request_for(clips)))
    assert _names(tmp_path / "out") == ["0001-a-red-cup-seed0.mp4", "a red cup-0.mp4"]


def test_unfinished_videos_of_shards_on_other_machines_are_left(request_for, tmp_path):
    (tmp_path / "out").mkdir()
    mine = tmp_path / "out" / left_by(4194304, "a red cup-0.mp4")
    other = tmp_path / "out" / ".partial-0a1b2c3d-4194304-0a1b2c-a red cup-1.mp4"
    mine.touch()
    other.touch()
    run(prepare(request_for(shard_clips(SAMPLES[:1], 0))))
    assert (mine.exists(), other.exists()) == (False, True)


def _make(request):
    run(prepare(request))


def test_killed_and_run_again(request_for, tmp_path):
    """SIGKILL while videos are made: what is finished is not made again, and only what is whole counts."""
    out = tmp_path / "out"
    request = request_for(shard_clips(SAMPLES, 0), steps=4)
    process = FORKSERVER.Process(target=_make, args=(request,))
    process.start()
    while not list(out.glob("a *.mp4")) and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("a *.mp4")}
    assert 1 <= len(kept) < 4
    job = prepare(request)
    assert len(job.todo) == 4 - len(kept)
    assert run(job).failures == []
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    facts = list(inspect(sorted(out.glob("a *.mp4"))))
    assert [fact.frames for fact in facts] == [5] * 4
    assert not list(out.glob(".partial-*"))
