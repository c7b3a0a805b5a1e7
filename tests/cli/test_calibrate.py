"""`dit-sparse calibrate` and `inspect`."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse import AdaSpa, Pisa, Schedule, velocity_ramp
from dit_sparse.calibrate.quality import THRESHOLDS
from dit_sparse.pipelines import load_pipeline
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
    capsys.readouterr()
    assert exit_code(*run, "--plan-file", "plan.safetensors", "--density", "0.2") == 2
    assert "--density 0.2 would have no effect beside --plan-file 'plan.safetensors'" in capsys.readouterr().err
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


def test_a_quality_is_found_with_the_parameters_and_the_schedule_that_are_given(model, capsys):
    command = ["calibrate", "--prompt", "a red ball", "--model", model, *SMALL, "--method", "adaspa", "--error", "0.9"]
    options = ["--block", "8", "--head-shift", "0.5", "--remainder", "mean", "--warmup", "0.5", "--dense-layers=0"]
    assert exit_code(*command, *options, "--never-slower", "false") == 0
    config = json.loads(Path("adaspa.json").read_text())
    found = Schedule.from_config(config)
    assert found.method == AdaSpa(density=found.method.density, block=8, head_shift=0.5)
    wanted = Schedule(found.method, warmup=0.5, dense_layers=(0,), remainder="mean", never_slower=False)
    assert found == replace(wanted, layer_densities=found.layer_densities)


def test_measures_a_velocity_ramp_and_generates_with_it(model, capsys):
    prompts = ["a red ball", "a blue square"]
    command = ["calibrate", "--prompts", prompts_file(*prompts), "--model", model, *SMALL, "--steps", "5"]
    options = ["--method", "pisa", "--block", "8", "--density", "0.4", "--dense-layers=0", "--seed", "3"]
    assert exit_code(*command, "--velocity-ramp", *options) == 0
    output = capsys.readouterr()
    heading, *rows, last = output.out.splitlines()
    assert heading.split() == ["step", "density"]
    assert last == "config: pisa.json"
    assert output.err.splitlines()[-2:] == [f"velocity: {prompt}" for prompt in prompts]
    found = Schedule.from_config(json.loads(Path("pisa.json").read_text()))
    assert found == Schedule(Pisa(density=0.4, block=8), dense_layers=(0,), ramp=found.ramp)

    pipe = load_pipeline(model)

    def run():
        for prompt in prompts:
            sizes = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 5}
            pipe(prompt, generator=torch.Generator().manual_seed(3), output_type="latent", **sizes)

    assert found.ramp == pytest.approx(velocity_ramp(pipe, run, 0.4), abs=1e-3)
    assert len(found.ramp) == 4
    assert max(found.ramp) - min(found.ramp) > 0.01
    assert [row.split() for row in rows] == [[str(n), f"{density:.3f}"] for n, density in enumerate(found.ramp, 2)]

    run = ["generate", "--prompt", "a ball", "--model", model, *SMALL, "--steps", "5", "--config", "pisa.json"]
    assert exit_code(*run, "--out", "out") == 0
    (line,) = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert line["config"]["ramp"] == list(found.ramp)
    assert line["sparse_density"] == pytest.approx(0.4, abs=0.1)


@pytest.mark.parametrize("steps", [["--steps", "1"], ["--warmup", "1"]])
def test_a_ramp_needs_a_sparse_step(model, capsys, monkeypatch, steps):
    monkeypatch.setattr("dit_sparse.calibrate.command.run_dense", lambda *_: pytest.fail("runs the model first"))
    command = ["calibrate", "--prompt", "a red ball", "--model", model, *SMALL, "--velocity-ramp", "--method", "pisa"]
    assert exit_code(*command, *steps) == 2
    assert "--steps must be at least 2 for --velocity-ramp, and one sparse, got" in capsys.readouterr().err
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--velocity-ramp needs --method, got none"),
        (["--method", "pisa", "--error", "0.1"], "not both of --error and --velocity-ramp"),
        (["--method", "pisa", "--psnr", "30"], "not both of --psnr and --velocity-ramp"),
        (["--method", "pisa", "--ramp", "0.5,0.2"], "--ramp would have no effect with --velocity-ramp"),
        (["--method", "pisa", "--noise-densities", "0.5,0.2"], "--noise-densities would have no effect"),
        (["--method", "pisa", "--shared-from", "0.2"], "--shared-from would have no effect without a plan file"),
        (["--method", "pisa", "--density", "0.005"], "density must be from 0.01 to 1 to be the mean of a ramp, got"),
        (["--method", "pisa", "--density", "2"], "density must be above 0 and at most 1, got 2.0"),
        (["--method", "pisa", "--warmup", "2"], "warmup must be from 0 to 1, got 2.0"),
        (["--method", "skip"], "needs a method with a density, got 'skip'"),
        (["--method", "dense"], "needs a method with a density, got 'dense'"),
        (["--method", "lea", "--error", "0.1"], "not both"),
        (["--method", "neighborhood", "--window", "3x3x3"], "'neighborhood', which has none as it is set"),
        (["--method", "losa"], "--velocity-ramp needs a density, got none for 'losa'"),
        (["--method", "pisa", "--out", "."], "got the folder '.'"),
    ],
)
def test_what_has_no_ramp_is_refused_in_one_line(capsys, monkeypatch, options, message):
    monkeypatch.setattr("dit_sparse.generate.models.load_model", lambda request: pytest.fail("loads a model first"))
    assert exit_code("calibrate", "--prompt", "a", "--velocity-ramp", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["calibrate"], "no prompts"),
        (["calibrate", "--prompt", "a", "--density", "2"], "density must be above 0"),
        (["calibrate", "--prompt", "a", "--error", "0.5", "--psnr", "30"], "not both"),
        (["calibrate", "--prompt", "a", "--method", "lea"], "method must be paro"),
        (["calibrate", "--prompt", "a", "--method", "adaspa", "--error", "7"], "error must be above 0"),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--psnr", "32", "--density", "0.9"],
            "--density would have no",
        ),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--psnr", "32", "--shared-from", "0", "--scratch", "x"],
            "--shared-from, --scratch would have no effect",
        ),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--psnr", "32", "--sigma", "0.5"],
            "no such option: --sigma",
        ),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--psnr", "32", "--threshold", "0.5"],
            "no such option: --threshold",
        ),
        (
            ["calibrate", "--prompt", "a", "--method", "pisa", "--error", "0.1", "--tile", "4x4x4"],
            "no such option: --tile; method pisa takes",
        ),
        (["calibrate", "--prompt", "a", "--method", "lea", "--psnr", "32", "--ramp", "0.5,0.2"], "ramp must be none"),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--error", "0.1", "--remainder", "all"],
            "remainder must be one of",
        ),
        (["calibrate", "--prompt", "a", "--method", "no", "--error", "0.1"], "no such method|unknown method"),
        (
            ["calibrate", "--prompt", "a", "--method", "lea", "--error", "0.1", "--dense-layers", "9"],
            "dense_layers must be from",
        ),
        (["calibrate", "--prompt", "a", "--remainder", "mean"], "no such option for a plan file: --remainder"),
        (["calibrate", "--prompt", "a", "--tiel", "4x4x4"], "did you mean '--tile'?"),
        (["calibrate", "--prompt", "a", "--warmup", "0.2"], "--warmup would have no effect on a plan file"),
        (["calibrate", "prompts.txt"], "give a file by --prompts"),
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
    assert any(part in error for part in message.split("|"))
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
