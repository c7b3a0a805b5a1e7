"""Scoring, with a stand-in for VBench: what is scored, how it is named, and what is never done twice."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse.vbench import Request, ScoreJob, read_scores, run_job, score, survey
from dit_sparse.vbench.dimensions import DIMENSIONS
from dit_sparse.vbench.job import _environment
from dit_sparse.vbench.results import read_plan
from dit_sparse.vbench.scoring import Listener
from tests.processes import left_by
from tests.vbench.standin import calls, make_videos


@pytest.fixture
def own(tmp_path, standin, weights, monkeypatch):
    """Surveys videos of other prompts, which are the names' own; no dimension needs weights."""
    for name, dimension in DIMENSIONS.items():
        monkeypatch.setitem(DIMENSIONS, name, replace(dimension, files=(), hub_model=False, packages=()))
    monkeypatch.setattr(
        "dit_sparse.vbench.preflight.find_dimensions", lambda names, custom: tuple(DIMENSIONS[name] for name in names)
    )

    def make(*names, dimensions=("aesthetic_quality",), **options):
        make_videos(tmp_path / "videos", *names)
        return survey(Request(tmp_path / "videos", dimensions, True, python=standin, **options))

    return make


def _names(weights: Path) -> list[str]:
    return [line for line in calls(weights) if line not in ("load", "initialize")]


def test_scores_each_video_once(own, tmp_path, weights):
    out = tmp_path / "scores"
    outcome = score(own("at 0.25.mp4", "at 0.75.mp4"), out)
    assert (outcome.made, outcome.done, outcome.failures) == (2, 0, [])
    (row,) = read_scores(out).dimensions
    assert (row.score, row.videos) == (0.5, 2)
    again = score(own("at 0.25.mp4", "at 0.75.mp4", "at 0.5.mp4"), out)
    assert (again.made, again.done) == (1, 2)
    assert _names(weights) == [f"aesthetic_quality at {n}.mp4" for n in ("0.25", "0.75", "0.5")]
    assert read_scores(out).dimensions[0].videos == 3


def test_a_result_tells_what_it_is_of(own, tmp_path):
    found = own("at 0.25.mp4")
    score(found, tmp_path / "scores")
    (key,) = read_plan(tmp_path / "scores", "aesthetic_quality").keys.values()
    result = json.loads((tmp_path / "scores" / "aesthetic_quality" / f"{key}.json").read_text())
    assert result["sha256"] == found.facts["at 0.25"].sha256
    assert (result["prompt"], result["vbench"], result["device"], result["score"]) == ("at 0.25", "0.1.5", "cpu", 0.25)
    assert result["versions"] == {"vbench": "0.1.5"}


@pytest.mark.parametrize("change", ["video", "prompt", "weights"])
def test_a_result_of_something_else_is_not_taken(own, tmp_path, weights, monkeypatch, change):
    out, prompts = tmp_path / "scores", {"a.mp4": "at 0.25"}
    score(own("a.mp4", prompts=prompts), out)
    if change == "video":
        make_videos(tmp_path / "videos", "a.mp4", frames=4)
        outcome = score(own(prompts=prompts), out)
    elif change == "prompt":
        outcome = score(own("a.mp4", prompts={"a.mp4": "at 0.5"}), out)
    else:
        monkeypatch.setattr("dit_sparse.vbench.scoring.weights_hash", lambda *_: "other")
        outcome = score(own("a.mp4", prompts=prompts), out)
    assert (outcome.made, outcome.done) == (1, 0)
    assert read_scores(out).dimensions[0].videos == 1


@pytest.mark.parametrize("dimension", ["subject_consistency", "imaging_quality", "color"])
def test_models_are_loaded_once(own, tmp_path, weights, dimension):
    assert score(own("a.mp4", "b.mp4", "c.mp4", dimensions=(dimension,)), tmp_path / "scores").made == 3
    assert calls(weights).count("load") == 1
    assert calls(weights).count("initialize") == (dimension == "color")


def test_consistency_knows_how_many_frames_were_seen(own, tmp_path):
    names = ("short at 0.9.mp4", "long at 0.5.mp4")
    found = own(*names, dimensions=("subject_consistency", "object_class", "appearance_style"))
    assert score(found, tmp_path / "scores").failures == []
    rows = {row.dimension: row.score for row in read_scores(tmp_path / "scores").dimensions}
    # The stand-in sees five frames and nine, 16 of each, and again five and nine.
    assert rows["subject_consistency"] == pytest.approx((0.9 * 4 + 0.5 * 8) / 12)
    assert rows["object_class"] == pytest.approx(0.7)
    assert rows["appearance_style"] == pytest.approx((0.9 * 5 + 0.5 * 9) / 14)


def test_a_video_that_fails_is_named_and_costs_no_other(own, tmp_path):
    found = own("a boom.mp4", "b skip.mp4", "c wget.mp4", "d connect.mp4", "e at 0.5.mp4")
    outcome = score(found, tmp_path / "scores")
    assert outcome.made == 1
    boom, skip, wget, connect = outcome.failures
    assert boom == "aesthetic_quality: a boom: RuntimeError: no such luck"
    assert skip == "aesthetic_quality: b skip: ValueError: VBench could not decode it and left it out"
    assert "c wget: PermissionError: VBench would run wget to fetch a file" in wget
    assert "VBench would fetch a file that it lacks; use --allow-download" in connect
    with pytest.raises(ValueError, match=r"4 videos are not scored, such as 'a boom'"):
        read_scores(tmp_path / "scores")


def test_the_exit_status_of_the_process_counts(own, tmp_path):
    outcome = score(own("a at 0.5.mp4", "b crash.mp4", "c.mp4"), tmp_path / "scores")
    assert outcome.made == 1
    (line,) = outcome.failures
    assert line.startswith("aesthetic_quality, shard 1: exit status 7: ")
    assert "logs/aesthetic_quality-1.log" in line


def test_a_video_without_the_object_has_no_score(own, tmp_path):
    outcome = score(own("a absent.mp4", "b at 0.5.mp4", dimensions=("color",)), tmp_path / "scores")
    assert (outcome.made, outcome.failures) == (2, [])
    (row,) = read_scores(tmp_path / "scores").dimensions
    assert row.score == 0.5
    # In every other dimension it is an error.
    assert score(own("a absent.mp4"), tmp_path / "other").failures[0].endswith("ZeroDivisionError: division by zero")


def test_shards_share_the_devices(own, tmp_path, weights):
    found, jobs = own(*(f"{name}.mp4" for name in "abcde"), dimensions=("aesthetic_quality", "color")), []

    def run(job, **options):
        jobs.append(job)
        return run_job(replace(job, device="cpu"), **options)

    outcome = score(found, tmp_path / "scores", devices=("cuda:0", "cuda:1"), shards=2, run=run)
    assert outcome.made == 10
    assert [(job.dimension, job.shard, len(job.items)) for job in jobs] == [
        ("aesthetic_quality", 1, 3),
        ("aesthetic_quality", 2, 2),
        ("color", 1, 3),
        ("color", 2, 2),
    ]
    assert {job.device for job in jobs} == {"cuda:0", "cuda:1"}
    assert len(_names(weights)) == len(set(_names(weights))) == 10


def test_a_job_can_be_sent_elsewhere(own, tmp_path, weights):
    jobs = []
    found = own("at 0.25.mp4")
    with pytest.raises(NotImplementedError):
        score(found, tmp_path / "scores", run=lambda job, **_: jobs.append(job) or _refuse())
    job = pickle.loads(pickle.dumps(jobs[0]))
    assert isinstance(job, ScoreJob)
    assert run_job(job).scored == ("at 0.25",)
    assert read_scores(tmp_path / "scores").dimensions[0].score == 0.25


def _refuse():
    raise NotImplementedError


def test_a_job_sees_its_own_device(own, monkeypatch):
    job = ScoreJob("color", 1, (), "python", "weights", "log", "cuda:1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _environment(job)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert _environment(job)["CUDA_VISIBLE_DEVICES"] == "6"
    assert _environment(replace(job, device="cuda"))["CUDA_VISIBLE_DEVICES"] == "4,6"
    assert _environment(replace(job, device="cpu"))["CUDA_VISIBLE_DEVICES"] == ""


class _Official:
    """Videos of the stand-in's flickering prompt, of which those named "moves" do not hold still."""

    def __init__(self, folder, monkeypatch, standin, weights):
        self.folder, self.python, self.weights = folder, standin, weights
        raft = weights / "raft_model" / "models" / "raft-things.pth"
        raft.parent.mkdir(parents=True)
        torch.save({}, raft)
        make_videos(folder, *(f"a still cup-{index}.mp4" for index in range(25)))

    def survey(self, **options):
        return survey(Request(self.folder, ("temporal_flickering",), python=self.python, **options))


@pytest.fixture
def official(tmp_path, monkeypatch, standin, weights):
    return _Official(tmp_path / "videos", monkeypatch, standin, weights)


def test_flickering_is_measured_on_the_first_still_videos(official, tmp_path, standin):
    (site,) = (standin.parents[1] / "lib").glob("python*/site-packages")
    code = site / "vbench" / "cli" / "static_filter.py"
    before = code.read_text()
    code.write_text(before.replace('"moves" not in path', 'path[-6:] not in ("-0.mp4", "11.mp4")'))
    try:
        outcome = score(official.survey(), tmp_path / "scores")
    finally:
        code.write_text(before)
    assert (outcome.made, outcome.failures) == (25 + 5, [])
    plan = read_plan(tmp_path / "scores", "temporal_flickering")
    # VBench goes through the files by name, where 10 comes before 2.
    assert sorted(plan.keys) == [f"a still cup-{index}" for index in (1, 10, 12, 13, 14)]
    assert plan.static_filter == {"judged": 25, "kept": 5, "unjudged": [], "prompts_without": []}
    assert [line for line in calls(official.weights) if line == "load"] == ["load"]
    again = score(official.survey(), tmp_path / "scores")
    assert (again.made, again.done) == (0, 30)


def test_flickering_without_the_filter_is_marked(official, tmp_path):
    outcome = score(official.survey(static_filter=False), tmp_path / "scores")
    assert outcome.made == 5
    with pytest.raises(ValueError, match="temporal_flickering: the static filter was not applied"):
        read_scores(tmp_path / "scores")


def test_one_missing_video_is_refused(official, tmp_path):
    (official.folder / "a still cup-7.mp4").unlink()
    with pytest.raises(ValueError, match="1 of 25 videos are missing, such as 'a still cup-7'"):
        score(official.survey(), tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    score(official.survey(allow_partial=True, static_filter=False), tmp_path / "scores")
    (official.folder / "a still cup-2.mp4").unlink()
    score(official.survey(allow_partial=True, static_filter=False), tmp_path / "scores")
    lines = read_scores(tmp_path / "scores", allow_partial=True).lacks
    assert "temporal_flickering: 1 videos are missing, such as 'a still cup-2'" in lines


def test_videos_that_cannot_be_used_are_refused(official, tmp_path):
    (official.folder / "a still cup-7.mp4").write_text("no video")
    make_videos(official.folder, "a still cup-8.mp4", fps=30)
    found = official.survey()
    assert found.incomplete == (
        "a still cup-7.mp4: no video that can be decoded",
        "a still cup-8: fps 30.0, where 23 of 24 videos have 8.0",
    )
    with pytest.raises(ValueError, match=r"no video that can be decoded \(and 1 more; `dit-sparse vbench check`"):
        score(found, tmp_path / "scores")


def test_missing_weights_are_refused_before_anything_runs(official, tmp_path):
    (official.weights / "raft_model" / "models" / "raft-things.pth").unlink()
    with pytest.raises(ValueError, match=r"static_filter: .*raft-things.pth is missing; it comes from https://"):
        score(official.survey(allow_partial=True), tmp_path / "scores")
    assert calls(official.weights) == []
    assert not (tmp_path / "scores").exists()


def test_a_dimension_names_what_it_cannot_read(tmp_path, standin, weights):
    names = ("a-0.gif", "b-0.mp4", "A person is dancing-0.mp4", "A person is doing push-ups-0.mp4")
    make_videos(tmp_path / "videos", *names)
    found = survey(Request(tmp_path / "videos", ("motion_smoothness", "human_action"), True, python=standin))
    assert "a-0.gif: motion_smoothness reads mp4 only" in found.incomplete
    assert "a-0" not in found.usable(DIMENSIONS["motion_smoothness"])
    # VBench reads the name up to the first hyphen.
    assert found.usable(DIMENSIONS["human_action"]) == ("A person is dancing-0",)


def test_a_video_that_is_named_and_not_there_is_missed(own, tmp_path):
    found = own("a.mp4", prompts={"a.mp4": "at 0.5", "b.mp4": "at 0.5"}, allow_partial=True)
    assert found.incomplete == ("1 of 2 videos are missing, such as 'b.mp4'",)
    score(found, tmp_path / "scores")
    with pytest.raises(ValueError, match=r"aesthetic_quality: 1 videos are missing, such as 'b\.mp4'"):
        read_scores(tmp_path / "scores")


def test_half_written_results_are_cleared_away(own, tmp_path):
    folder = tmp_path / "scores" / "aesthetic_quality"
    folder.mkdir(parents=True)
    (folder / left_by(4194304, "abc.json")).write_text('{"score": 0.')
    score(own("a.mp4"), tmp_path / "scores")
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json"]
    assert not list(folder.glob(".partial-*"))


_SCRIPT = """
import sys
from pathlib import Path
from dit_sparse.vbench import Request, score, survey
videos, python, out = map(Path, sys.argv[1:])
score(survey(Request(videos, ("temporal_flickering",), True, python=python)), out)
"""


def test_killed_and_run_again(tmp_path, standin, weights):
    """SIGKILL while videos are scored: what is finished is not done again, and only what is whole counts."""
    videos, out = tmp_path / "videos", tmp_path / "scores"
    make_videos(videos, "0.mp4", "1.mp4", f"2 {'slow ' * 8}.mp4", "3.mp4", "4.mp4")

    def finished():
        return list((out / "temporal_flickering").glob("[0-9a-f]*.json"))

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", _SCRIPT, videos, standin, out], env=environment) as process:
        _wait_for(lambda: len(finished()) >= 2)
        process.kill()
    # The process that scores leaves with the one that started it, in the middle of a video.
    time.sleep(2.3)
    before = _names(weights)
    assert len(finished()) == 2
    assert len(before) in (2, 3)
    (weights / "hurry").touch()
    outcome = score(survey(Request(videos, ("temporal_flickering",), True, python=standin)), out)
    assert (outcome.made, outcome.done) == (3, 2)
    assert len(_names(weights)) - len(before) == 3
    assert read_scores(out).dimensions[0].videos == 5


def _wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_an_interruption_ends_the_processes(own, tmp_path, weights):
    # A shell that starts the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    class Interrupt(Listener):
        def scored(self, dimension, name):
            os.kill(os.getpid(), signal.SIGINT)

    found = own(*(f"{number} slow.mp4" for number in range(6)))
    try:
        with pytest.raises(KeyboardInterrupt):
            score(found, tmp_path / "scores", listener=Interrupt())
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(_names(weights)) < 6
    assert score(found, tmp_path / "scores").failures == []
    assert read_scores(tmp_path / "scores").dimensions[0].videos == 6


@pytest.mark.usefixtures("ray_cluster")
def test_jobs_on_ray_give_the_same_results(own, tmp_path, weights):
    from dit_sparse.vbench.on_ray import RayRunner

    class Names(Listener):
        def __init__(self):
            self.names = []

        def scored(self, dimension, name):
            self.names.append((dimension, name))

    found = own(*(f"at 0.{number}.mp4" for number in range(1, 6)), dimensions=("aesthetic_quality", "color"))
    listener = Names()
    with RayRunner("auto", device="cpu", workers=2) as runner:
        outcome = score(found, tmp_path / "scores", shards=runner.workers, runner=runner, listener=listener)
        again = score(found, tmp_path / "scores", shards=runner.workers, runner=runner)
    assert (outcome.made, outcome.failures, again.made, again.done) == (10, [], 0, 10)
    assert len(set(listener.names)) == len(listener.names) == len(_names(weights)) == 10
    score(found, tmp_path / "here")
    for row, want in zip(
        read_scores(tmp_path / "scores").dimensions, read_scores(tmp_path / "here").dimensions, strict=True
    ):
        assert (row.dimension, row.score, row.videos) == (want.dimension, want.score, 5)


def test_a_worker_does_not_score_again_what_a_lost_one_has(own, tmp_path, weights):
    from dit_sparse.vbench.on_ray import _Worker

    jobs, found = [], own("at 0.25.mp4", "at 0.5.mp4")
    with pytest.raises(NotImplementedError):
        score(found, tmp_path / "scores", run=lambda job, **_: jobs.append(job) or _refuse())
    (job,) = jobs
    assert _Worker("cpu").run(replace(job, items=job.items[:1])).scored == ("at 0.25",)
    report = _Worker("cpu").run(job)
    assert (report.scored, report.error, report.job) == (("at 0.25", "at 0.5"), None, job)
    assert _Worker("cpu").run(job).scored == report.scored
    assert [name.rpartition("ty ")[2] for name in _names(weights)] == ["at 0.25.mp4", "at 0.5.mp4"]
