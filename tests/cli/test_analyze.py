"""`dit-sparse analyze`."""

import json
from pathlib import Path

import pytest

from tests.cli.command import SMALL, assert_refused, exit_code, prompts_file

COMMAND = ["analyze", "--prompt", "a red ball", "--methods", "adaspa:block=8,neighborhood:tile=1x2x2", "--layers", "2"]


def test_measures_recommends_and_generates(model, capsys):
    small = [*COMMAND, "--model", model, *SMALL, "--steps", "4", "--target", "0.2", "--densities", "0.5,0.25"]
    assert exit_code(*small, "--out", "config.json", "--report", "report.json") == 0
    output = capsys.readouterr()
    assert "recommended" in output.out
    assert "adaspa:block=8 0.25" in output.out
    assert "sampling: a red ball" in output.err
    report, config = (json.loads(Path(name).read_text()) for name in ("report.json", "config.json"))
    assert report["recommended"]["config"] == config
    assert report["sampled"] == {"layers": [0, 1], "heads": [0, 1], "steps": [0, 2, 3], "rows": 64}
    assert len(report["rows"]) == 4 * 2 * 3
    assert {row["label"] for row in report["summary"]} == {row["label"] for row in report["rows"]}
    assert report["model"] == "tiny"
    run = ["generate", "--prompt", "a ball", "--model", model, *SMALL, "--config", "config.json"]
    assert exit_code(*run) == 0
    (line,) = [json.loads(line) for line in Path("videos/manifest.jsonl").read_text().splitlines()]
    assert line["config"] == config
    assert line["sparse_density"] < 1


def test_json(model, capsys):
    assert exit_code(*COMMAND, "--model", model, *SMALL, "--at", "0.5", "--densities", "0.5", "--json") == 0
    assert {row["step"] for row in json.loads(capsys.readouterr().out)["rows"]} == {1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "adaspe"], "did you mean 'adaspa'"),
        (["--densities", "0.5;0.2"], "--densities must be numbers with commas between them"),
        (["--densities", "0"], "density must be above 0"),
        (["--at", "1"], "shares of the run (--at) must be at least 0 and below 1, got (1.0,)"),
        (["--layers", "0"], "layers must be at least 1"),
        (["--target", "1.5"], "--target must be above 0 and at most 1"),
        (["--out", "no/config.json"], "--out must be in a folder that exists"),
        (["--report", "."], "--report must be a file such as report.json, got the folder '.'"),
        (["--out", "a.json", "--report", "./a.json"], "--out must not be --report"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--height", "33"], "height must be a multiple of"),
        (["prompts.txt"], "not both"),
    ],
)
def test_refuses_in_one_line(model, tmp_path, capsys, options, message):
    Path("prompts.txt").write_text("a ball\n")
    assert_refused(tmp_path, capsys, [*COMMAND, "--model", model, *SMALL, *options], message)


def test_never_replaces_its_prompts(tmp_path, capsys):
    prompts = prompts_file("a red ball")
    for option in ("--out", "--report"):
        assert_refused(tmp_path, capsys, ["analyze", prompts, option, prompts], f"{option} must not be the prompt file")
    assert Path(prompts).read_text() == "a red ball"
