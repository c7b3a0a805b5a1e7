"""The command on the page makes the same video again."""

from __future__ import annotations

import shlex

import pytest

from dit_sparse import cli
from dit_sparse.cli import generate
from dit_sparse.report.reproduce import generate_command
from dit_sparse.schedule import Schedule

SIZES = {"height": 96, "width": 128, "frames": 29, "steps": 20, "guidance": 3.5}
FILE = {"dtype": "float32", "device": "cpu", "format": "gif", "fps": 12}


@pytest.mark.parametrize(
    "config",
    [
        {"method": "adaspa"},
        {"method": "adaspa", "density": 0.1, "warmup": 0.0, "dense_layers": [0, -1], "refresh": [0.5, 7]},
        {"method": "adaspa", "ramp": [0.5, 0.25], "remainder": "mean", "head_adaptive": False},
        {"method": "neighborhood", "window": [3, 8, 8], "stride": [1, 4, 4], "causal": [True, False, False]},
        {"method": "sparge", "density": None},
        {"method": "sparge", "density": 0.25},
        {"method": "dense"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", ["a red ball", '-- it\'s "$HOME" `x` \\ ; rm', "--seed 3", "青 ball"])
def test_the_command_asks_for_the_same_video(config, prompt, monkeypatch) -> None:
    config = Schedule.from_config(config).to_config()
    line = {"prompt": prompt, "seed": 7, "model": "demo", "config": config, "negative_prompt": "", **SIZES, **FILE}
    asked = []
    monkeypatch.setattr(generate, "_generate", lambda request, console: asked.append(request) or 0)
    program, *arguments = shlex.split(generate_command(line, compare_dense=True))
    assert program == "dit-sparse"
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    (request,) = asked
    assert request.prompts == (prompt,)
    assert dict(request.config) == config
    assert request.compare_dense
    for name in ("seed", "model", "negative_prompt", *SIZES, *FILE):
        assert getattr(request, name) == line[name], name


def test_what_is_left_open_stays_open() -> None:
    config = Schedule.from_config({"method": "adaspa"}).to_config()
    line = {"prompt": "x", "seed": 0, "model": "m", "config": config, "negative_prompt": None, "guidance": None}
    words = generate_command(line).split()
    wanted = "dit-sparse generate --prompt x --seed 0 --model m --method adaspa --density"
    assert words == [*wanted.split(), str(config["density"])]
    assert "--offload model" in generate_command(line | {"offload": "model"})
