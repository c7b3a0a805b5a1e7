"""`dit-sparse vbench`, with a stand-in for VBench's environment."""

import json
from pathlib import Path

import pytest
import vbench_score

from dit_sparse.vbench import DIMENSIONS
from tests.cli.command import SMALL, exit_code, prompts_file, tree
from tests.vbench.standin import calls, make_standin, make_videos
from tests.vbench.test_table import write_scores


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    return make_standin(tmp_path_factory.mktemp("standin") / "environment")


@pytest.fixture(autouse=True)
def weights(tmp_path_factory, monkeypatch, standin):
    folder = tmp_path_factory.mktemp("weights")
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(folder))
    monkeypatch.setenv("DIT_SPARSE_VBENCH_PYTHON", str(standin))
    return folder


def test_prompts(capsys):
    assert exit_code("vbench", "prompts", "--dimension", "color", "--dimension", "temporal_flickering") == 0
    assert capsys.readouterr().out == "a still cup\na red cup\n"
    assert exit_code("vbench", "prompts", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["videos"] for row in rows] == [25, 5, 5, 5]


def test_generate(model, capsys):
    generate = ["vbench", "generate", "--dimension", "color", "--model", model, "--out", "videos"]
    generate += ["--method", "adaspa", "--block", "8", "--density", "0.3", *SMALL, "--frames", "5", "--steps", "1"]
    for shard in ("1/2", "2/2"):
        assert exit_code(*generate, "--shard", shard) == 0
    assert {path.name for path in Path("videos").glob("*.mp4")} == {f"a red cup-{index}.mp4" for index in range(5)}
    assert exit_code(*generate) == 0
    assert "5 of 5 already done" in capsys.readouterr().out
    # The videos are the method's, whatever is fastest here.
    lines = [json.loads(line) for line in Path("videos/manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["config"]["never_slower"] is False for line in lines)


def test_generate_on_groups_of_ranks(model, monkeypatch):
    asked = []
    monkeypatch.setattr("dit_sparse.cli.generate.make_videos", lambda *arguments: asked.append(arguments) or 0)
    options = ["--ray", "auto", "--ray-workers", "3", "--parallel", "ulysses=2"]
    assert exit_code("vbench", "generate", "--dimension", "color", "--model", model, *options) == 0
    ((request, _, *ray),) = asked
    assert (request.parallel, len(request.clips), ray) == ("ulysses=2", 5, ["auto", 3])


def test_score_and_table(capsys, weights):
    make_videos(Path("videos"), *(f"a still cup-{index}.mp4" for index in range(5)))
    score = ["vbench", "score", "videos", "--dimension", "temporal_flickering", "--no-static-filter", "--device", "cpu"]
    for made, done in ((5, 0), (0, 5)):
        assert exit_code(*score) == 0
        assert capsys.readouterr().out.startswith(f"{made} scored, {done} already there, 0 failed; ")
    assert len(calls(weights)) == 5
    assert exit_code("vbench", "table", "vbench-scores") == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: vbench-scores is incomplete: temporal_flickering: the static filter was not applied"
    )
    assert exit_code("vbench", "table", "vbench-scores", "--allow-partial") == 0
    out = capsys.readouterr().out
    assert "temporal_flickering" in out
    assert "0.5000" in out
    assert "Total" not in out


def test_other_prompts(model, capsys):
    prompts_file("a red ball", "a/b")
    generate = ["vbench", "generate", "prompts.txt", "--model", model, "--method", "dense", "--out", "videos"]
    assert exit_code(*generate, *SMALL, "--frames", "5", "--steps", "1", "--shard", "1/5") == 0
    assert {path.name for path in Path("videos").glob("*.mp4")} == {"a red ball-0.mp4", "0002-a-b-seed0.mp4"}
    score = ["vbench", "score", "videos", "--custom", "--dimension", "temporal_flickering", "--device", "cpu"]
    assert exit_code(*score) == 0
    assert exit_code("vbench", "table", "vbench-scores", "--json") == 0
    *_, last = capsys.readouterr().out.split("sums up\n")
    found = json.loads(last)["vbench-scores"]
    assert found["dimensions"]["temporal_flickering"]["videos"] == 2
    assert found["total"] is None


def test_table_of_two_folders(tmp_path, capsys):
    for name, value in (("dense", 0.8), ("sparse", 0.7)):
        write_scores(tmp_path / name, {dimension: [value] for dimension in DIMENSIONS})
    assert exit_code("vbench", "table", "dense", "sparse") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-3:]] == ["Quality", "Semantic", "Total"]
    assert "80.00" in next(line for line in lines if line.startswith("dynamic_degree"))


def test_check_names_everything(capsys):
    make_videos(Path("videos"), "a cat-0.mp4", "a cat-1.mp4", "a cat-2.mp4")
    make_videos(Path("videos"), "a cat-3.mp4", fps=30)
    make_videos(Path("videos"), "a cat-2.gif")
    Path("videos/a cat-1.mp4").write_text("no video")
    assert exit_code("vbench", "check", "videos", "--dimension", "motion_smoothness") == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("motion_smoothness: ")
    assert "amt-s.pth is missing; it comes from https://" in lines[0]
    assert lines[1] == "1 of 5 videos are missing, such as 'a cat-4'"
    assert lines[2].startswith("several videos of the name 'a cat-2': a cat-2.gif, a cat-2.mp4")
    assert lines[3] == "a cat-1.mp4: no video that can be decoded"
    assert "fps" in lines[4]
    assert lines[5] == "missing: a cat-4"
    assert last == "2 videos can be scored, 5 problems"
    assert exit_code("vbench", "check", "videos", "--custom", "--dimension", "temporal_flickering", "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2


def test_a_video_that_fails_is_told(capsys):
    make_videos(Path("videos"), "boom.mp4", "fine.mp4")
    score = ["vbench", "score", "videos", "--custom", "--dimension", "temporal_flickering", "--device", "cpu"]
    assert exit_code(*score) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: temporal_flickering: boom: RuntimeError: no such luck\n"
    assert captured.out.startswith("1 scored, 0 already there, 1 failed; ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["prompts", "--dimension", "colour"], "no such VBench dimension: colour; there are "),
        (["prompts", "--vbench-python", "nowhere"], "nowhere is missing; `dit-sparse vbench setup` makes one"),
        (["generate", "--shard", "9/8"], "--shard must be such as 2/8"),
        (["generate", "p.txt", "--dimension", "color"], "leave it out with a file of prompts"),
        (["generate", "--dimension", "color", "--densty", "1"], "did you mean --density?"),
        (["score", "nowhere", "--dimension", "temporal_flickering"], "no such folder of videos: nowhere"),
        (["score", ".", "--device", "tpu"], "--device must be auto, cpu"),
        (["score", ".", "--shards", "0"], "--shards must be at least 1"),
        (["score", ".", "--prompt-file", "p.txt"], "--prompt-file needs --custom"),
        (["score", ".", "--custom", "--prompt-file", "p.txt"], "p.txt is not valid JSON"),
        (["score", ".", "--custom", "--dimension", "scene"], "scene: needs VBench's own prompts"),
        (["score", ".", "--custom", "--dimension", "temporal_flickering"], ". holds no videos"),
        (["score", ".", "--dimension", "temporal_flickering"], "raft-things.pth is missing"),
        (["check", "nowhere"], "no such folder of videos"),
        (["table", "nowhere"], "nowhere holds no scores of VBench"),
        (["setup", "--light", "--folder", "."], "holds something else than an environment"),
    ],
)
def test_refuses_bad_input(capsys, command, message):
    Path("p.txt").write_text("a red ball\n")
    before = tree(Path())
    assert exit_code("vbench", *command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert tree(Path()) == before


def test_the_script_scores_and_sums_up(capsys, tmp_path):
    make_videos(tmp_path / "videos", "a.mp4")
    arguments = ["videos", "--out", "scores", "--custom", "--dimension", "temporal_flickering", "--device", "cpu"]
    assert vbench_score.main(arguments) == 0
    assert "0.5000" in capsys.readouterr().out
    assert vbench_score.main(["nowhere", "--custom"]) == 2
