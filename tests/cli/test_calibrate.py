"""`dit-sparse calibrate` and `inspect`."""

import json
from pathlib import Path

import pytest

from dit_sparse.calibrate.quality import THRESHOLDS
from dit_sparse.reorder import AXIS_ORDERS
from tests.cli.command import SMALL, exit_code, prompts_file


@pytest.mark.parametrize("cut", [("--block", "8"), ("--tile", "1x2x4")], ids=["runs", "tiles"])
def test_calibrates_inspects_and_generates_from_the_plan(model, capsys, cut):
    prompts = prompts_file("a red ball", "a blue square")
    command = ["calibrate", "--prompts", prompts, "--model", model, *SMALL, "--density", "0.5", *cut]
    assert exit_code(*command, "--out", "plan.safetensors", "--alpha", "0.5") == 0
    output = capsys.readouterr()
    assert "a blue square" in output.out
    assert "alpha 0.5" in output.out
    assert output.err.splitlines()[-4:] == [
        f"{what}: {p}" for what in ("orders", "masks") for p in ("a red ball", "a blue square")
    ]
    assert exit_code("inspect", "plan.safetensors", "--out", "plan.png") == 0
    assert "order and density" in capsys.readouterr().out
    assert Path("plan.png").stat().st_size > 1000
    assert exit_code("inspect", "plan.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["grid"], found["steps"], found["model"]) == ("3x4x4", 2, "tiny")
    orders = {order for layer in found["models"]["transformer"]["layers"] for order in layer["orders"]}
    if "--tile" in cut:
        assert found["block"] == "1x2x4"
        assert all(order.replace("x", "").isdecimal() for order in orders)
    else:
        assert found["block"] == 8
        assert orders <= set(AXIS_ORDERS)
    run = ["generate", "--prompt", "a ball", "--model", model, *SMALL, "--method", "paro", "--out", "out"]
    assert exit_code(*run, "--plan-file", "plan.safetensors", "--warmup", "0") == 0
    (line,) = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert line["dense_calls"] == {}
    assert 0.2 < line["sparse_density"] < 0.8
    assert sorted(p.name for p in Path().iterdir()) == ["out", "plan.png", "plan.safetensors", "prompts.txt"]


def test_calibrates_for_a_quality_and_generates_from_the_config(model, capsys):
    command = ["calibrate", "--prompt", "a red ball", "--model", model, *SMALL, "--method", "lea"]
    assert exit_code(*command, "--error", "0.9") == 0
    output = capsys.readouterr().out
    assert "Relative error (density) by layer and threshold" in output
    assert "config: lea.json" in output
    config = json.loads(Path("lea.json").read_text())
    assert (config["method"], config["warmup"]) == ("lea", 0)
    assert min(THRESHOLDS) <= min(config["layer_thresholds"])
    assert max(config["layer_thresholds"]) <= max(THRESHOLDS)
    run = ["generate", "--prompt", "a ball", "--model", model, *SMALL, "--config", "lea.json", "--out", "out"]
    assert exit_code(*run, "--no-strict") == 0
    capsys.readouterr()
    assert exit_code(*command, "--psnr", "-1") == 2
    assert "psnr must be a number of dB above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate"], "no prompts"),
        (["calibrate", "--prompt", "a", "--density", "2"], "density must be above 0"),
        (["calibrate", "--prompt", "a", "--error", "0.5", "--psnr", "30"], "not both"),
        (["calibrate", "--prompt", "a", "--method", "lea"], "method must be paro"),
        (["calibrate", "--prompt", "a", "--method", "adaspa", "--error", "7"], "error must be above 0"),
        (["calibrate", "--prompt", "a", "--threshold", "x"], "threshold must be head or global"),
        (["calibrate", "--prompt", "a", "--shared-from", "2"], "shared_from must be from 0 to 1"),
        (["calibrate", "--prompt", "a", "--tile", "4x4"], "tile must be 3 numbers such as 4x8x8 or none, got '4x4'"),
        (["calibrate", "--prompt", "a", "--tile", "4x0x4"], "tile must be a whole number of tokens, at least 1"),
        (["calibrate", "--prompt", "a", "--height", "33"], "height must be a multiple of"),
        (["calibrate", "--prompt", "a", "--out", "no/plan"], "--out must be in a folder that exists"),
        (["calibrate", "--prompt", "a", "--out", "."], "--out must be a file such as plan.safetensors, got the folder"),
        (["calibrate", "--prompt", "a", "--method", "lea", "--error", "0.5", "--out", "."], "got the folder '.'"),
        (["inspect", "nowhere"], "must be an existing file"),
        (["inspect", "nowhere", "--out", "a.jpg"], "--out must be a file such as plan.png, with the ending .png"),
        (["inspect", "nowhere.png", "--out", "nowhere.png"], "--out must not be the plan file"),
        (["inspect", "nowhere", "--out", "."], "got the folder '.'"),
    ],
)
def test_calibrate_and_inspect_refuse_in_one_line(model, capsys, arguments, message):
    extra = ["--model", model] if arguments[0] == "calibrate" else []
    assert exit_code(*arguments, *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ["calibrate", "--prompts", "kept.png", "--out", "kept.png"],
        ["inspect", "kept.png", "--out", "kept.png"],
        ["inspect", "kept.png", "--out", "link.png"],
    ],
)
def test_what_is_read_is_never_replaced(capsys, monkeypatch, command):
    monkeypatch.setattr("dit_sparse.generate.models.load_model", lambda request: pytest.fail("loads a model first"))
    Path("kept.png").write_text("a red ball")
    Path("link.png").symlink_to("kept.png")
    assert exit_code(*command) == 2
    assert "--out must not be the p" in capsys.readouterr().err
    assert Path("kept.png").read_text() == "a red ball"
