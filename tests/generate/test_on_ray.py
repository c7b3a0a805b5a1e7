"""Many prompts over the workers of a Ray cluster: a killed worker, a bad prompt, a second run."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate import Request, on_ray, prepare, render, run
from dit_sparse.generate.manifest import MANIFEST
from tests.pipelines.tiny import make_tiny_wan

ADASPA = {"method": "adaspa", "density": 0.3, "block": 8, "warmup": 0.0}
PROMPTS = [f"a red ball {n}" for n in range(20)]
DEADLY = PROMPTS[6]


class OddError(Exception):
    """Pickles and cannot be read again."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


class PoisonedWorker(on_ray._Worker):
    """Fails at the prompt "bad"; the first that writes `DEADLY` is killed with half of it written."""

    def __init__(self, request, device):
        super().__init__(request, device)
        self._encode = self._renderer.pipe.encode_prompt
        self._renderer.pipe.encode_prompt = self._poisoned
        self._write, render.write_partial = render.write_partial, self._half

    def _poisoned(self, prompt, **options):
        if prompt == "bad":
            raise OddError("no", "luck")
        return self._encode(prompt, **options)

    def _half(self, frames, partial, **options):
        if DEADLY.replace(" ", "-") in partial.name and not Path("killed").exists():
            partial.mkdir()
            (partial / "0000.png").write_bytes(b"half")
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self._write(frames, partial, **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_wan(tmp_path_factory.mktemp("model") / "tiny"))


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
    with on_ray.RayExecutor(request, workers=3) as executor:
        job = prepare(request, executor)
        assert (executor.device, executor.workers) == ("cpu", 3)
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
