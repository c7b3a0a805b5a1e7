"""Many prompts over the workers of a Ray cluster: a killed worker, a bad prompt, a second run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sparse.generate import Request, on_ray, prepare, run
from dit_sparse.generate.manifest import MANIFEST
from tests.cli.command import SMALL, exit_code, prompts_file
from tests.generate.workers import DEADLY, PoisonedWorker
from tests.pipelines.tiny import tiny_wan
from tests.processes import alive, within

ADASPA = {"method": "adaspa", "density": 0.3, "block": 8, "warmup": 0.0}
PROMPTS = [f"a red ball {n}" for n in range(20)]
assert DEADLY in PROMPTS


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that makes nothing of green."""
    pipe, folder = tiny_wan(), tmp_path_factory.mktemp("model") / "tiny"
    with torch.no_grad():
        pipe.text_encoder.shared.weight[pipe.tokenizer("green", add_special_tokens=False).input_ids] = torch.nan
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def request_for(ray_cluster, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(on_ray, "_Worker", PoisonedWorker)

    def make(*prompts, **changes):
        values = {"config": ADASPA, "out": Path("out"), "model": model, "device": "auto", "format": "png"}
        sizes = {"height": 64, "width": 64, "frames": 9, "steps": 2, "guidance": 5.0}
        return Request(prompts=prompts, **(values | sizes | changes))

    return make


def _pixels(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def _lines():
    return [json.loads(line) for line in Path("out", MANIFEST).read_text("utf-8").splitlines()]


def test_a_killed_worker_and_a_bad_prompt(request_for):
    request = request_for(*PROMPTS[:10], "bad", *PROMPTS[10:])
    with on_ray.RayExecutor(request, workers=2) as executor:
        job = prepare(request, executor)
        assert (executor.device, executor.workers) == ("cpu", 2)
        with pytest.warns(UserWarning, match="a worker died while it made 0007-.* another takes over"):
            outcome = run(job)
    assert Path("killed").exists()
    ((clip, error),) = outcome.failures
    assert (clip.index, str(error)) == (11, "OddError: no luck")

    lines = _lines()
    assert sorted(line["prompt"] for line in lines) == sorted(PROMPTS)
    folders = sorted(path for path in Path("out").iterdir() if path.name != MANIFEST)
    assert [path.name for path in folders] == sorted(line["file"] for line in lines)
    assert all(len(list(folder.iterdir())) == 9 for folder in folders)
    assert all(_pixels(folder).shape == (9, 64, 64, 3) for folder in folders)

    # One process makes the same video, and does not make it again.
    alone = request_for(PROMPTS[7], out=Path("alone"), device="cpu")
    run(prepare(alone))
    (own,) = Path("alone").glob("0001-*")
    (theirs,) = (line["file"] for line in lines if line["prompt"] == PROMPTS[7])
    assert np.array_equal(_pixels(own), _pixels(Path("out", theirs)))
    assert [clip.prompt for clip in prepare(request).todo] == ["bad"]

    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")}
    assert [line["prompt"] for line in run(prepare(request_for(*request.prompts, device="cpu"))).lines] == ["bad"]
    after = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*")}
    assert {path: time for path, time in after.items() if "-bad-" not in str(path)} == before
    assert len(_lines()) == 21


def test_groups_of_ranks(request_for, model, capsys):
    """Of two groups of two ranks one is killed; the videos are those of one process."""
    prompts = [*PROMPTS[4:8], "a green ball", *PROMPTS[8:10]]
    command = ["generate", prompts_file(*prompts), "--model", model, *SMALL, "--format", "png", "--out", "out"]
    command += ["--ray", "auto", "--ray-workers", "2", "--parallel", "ulysses=2", "--no-trace"]
    command += ["--density", "0.3", "--block", "8", "--warmup", "0"]
    assert exit_code(*command) == 1
    captured = capsys.readouterr()
    assert "a worker died while it made 0003-a-red-ball-6-seed0 (try 1: rank 0 was killed by SIGKILL)" in captured.err
    assert "failed: 0005-a-green-ball-seed0: ValueError: the model gave frames with NaN" in captured.err
    assert "6 made, 1 failed" in captured.out

    lines = _lines()
    assert sorted(line["prompt"] for line in lines) == sorted({*prompts} - {"a green ball"})
    assert {(line["parallel"], line["dense_calls"].get("warm-up")) for line in lines} == {("ulysses=2", None)}
    assert sorted(path.name for path in Path("out").iterdir()) == sorted([MANIFEST, *(line["file"] for line in lines)])
    alone = request_for(*prompts, out=Path("alone"), device="cpu")
    run(prepare(alone))
    for line in lines:
        ours, theirs = _pixels(Path("alone", line["file"])).astype(int), _pixels(Path("out", line["file"]))
        assert np.abs(ours - theirs).max() <= 1, "more than rounding differs"

    processes = [int(path.name) for path in Path("processes").iterdir()]
    assert len(processes) >= 2 * 3
    assert within(20, lambda: not any(map(alive, processes))), "ranks outlive their worker"
