import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate import Listener, Request, prepare, render, run
from dit_sparse.generate.manifest import MANIFEST
from dit_sparse.generate.run import check_folder
from dit_sparse.pipelines import session_of, statistics
from tests.pipelines.tiny import make_tiny_wan

ADASPA = {"method": "adaspa", "density": 0.3, "block": 8, "warmup": 0.0}
KEYS = {
    *("prompt", "seed", "model", "method", "config", "height", "width", "frames", "steps", "guidance", "dtype"),
    *("seconds", "attention_density", "dense_calls", "file", "key", "negative_prompt", "format", "fps", "versions"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make_tiny_wan(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def request_for(model, tmp_path):
    def make(*prompts, **changes):
        values = {"config": ADASPA, "out": tmp_path / "out", "model": model, "device": "cpu", "format": "png"}
        sizes = {"height": 64, "width": 64, "frames": 9, "steps": 2, "guidance": 5.0}
        return Request(prompts=prompts or ("a red ball",), **(values | sizes | changes))

    return make


def _lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / MANIFEST).read_text(encoding="utf-8").splitlines()]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)


def _pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


class _Recorder(Listener):
    def __init__(self, interrupt_at: int | None = None):
        self.renderings, self.steps, self.failures = [], 0, []
        self.interrupt_at = interrupt_at

    def rendering(self, clip, what, steps):
        self.renderings.append((clip.index, what, steps))

    def stepped(self):
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt

    def failed(self, clip, error):
        self.failures.append((clip.index, str(error)))


def test_makes_every_video_once(request_for, tmp_path):
    request = request_for("a red ball", "青", num_samples=2, seed=3)
    recorder = _Recorder()
    outcome = run(prepare(request), recorder)
    names = ["0001-a-red-ball-seed3", "0001-a-red-ball-seed4", "0002-prompt-seed3", "0002-prompt-seed4"]
    assert _names(tmp_path / "out") == names
    assert recorder.steps == 8
    lines = _lines(tmp_path / "out")
    assert lines == outcome.lines
    assert all(line.keys() >= KEYS for line in lines)
    assert [line["prompt"] for line in lines] == ["a red ball", "a red ball", "青", "青"]
    assert 0 < lines[0]["sparse_density"] <= 0.5
    calls, dense = lines[0]["calls"], sum(lines[0]["dense_calls"].values())
    assert calls == 2 * 2 * 2
    mean = (dense + (calls - dense) * lines[0]["sparse_density"]) / calls
    assert lines[0]["attention_density"] == pytest.approx(mean)

    again = prepare(request)
    assert again.todo == ()
    assert list(again.done) == lines
    assert run(again).lines == []
    assert _lines(tmp_path / "out") == lines


def test_a_line_has_receipts_of_every_layer(request_for):
    (line,) = run(prepare(request_for(config=ADASPA | {"warmup": 0.5, "dense_layers": [1]}))).lines
    found = line["receipts"]["transformer"]
    assert (found["layer"], found["calls"]) == ([0, 1], [4, 4])
    assert found["dense"] == {"warm-up": [2, 0], "layer": [0, 4]}
    assert found["density"][0] < 1 == found["density"][1]


def test_a_layer_that_cannot_be_sparse_fails_the_video_unless_allowed(request_for):
    """48 tokens are one block of 64."""
    config = ADASPA | {"block": 64}
    ((_, error),) = run(prepare(request_for(config=config))).failures
    assert "layer 0 would run dense: 'adaspa' at density 0.3 keeps every block of 48 tokens" in str(error)
    assert len(run(prepare(request_for(config=config | {"strict": False}))).lines) == 1


def test_a_line_is_enough_to_make_the_video_again(request_for, tmp_path):
    run(prepare(request_for("x", "a red ball", seed=5)))
    line = _lines(tmp_path / "out")[1]
    names = ("config", "height", "width", "frames", "steps", "guidance", "seed", "format", "dtype", "model")
    run(prepare(request_for(line["prompt"], out=tmp_path / "new", **{name: line[name] for name in names})))
    remade = tmp_path / "new" / "0001-a-red-ball-seed5"
    assert np.array_equal(_pixels(tmp_path / "out" / line["file"]), _pixels(remade))
    assert _lines(tmp_path / "new")[0]["key"] == line["key"]


def test_equal_prompts_each_get_a_file(request_for, tmp_path):
    run(prepare(request_for("a", "a")))
    assert _names(tmp_path / "out") == ["0001-a-seed0", "0002-a-seed0"]
    assert prepare(request_for("a", "a")).todo == ()


def test_other_settings_do_not_overwrite(request_for, tmp_path):
    run(prepare(request_for()))
    before = _pixels(tmp_path / "out" / "0001-a-red-ball-seed0")
    run(prepare(request_for(steps=3)))
    assert len(_names(tmp_path / "out")) == 2
    assert np.array_equal(_pixels(tmp_path / "out" / "0001-a-red-ball-seed0"), before)
    assert prepare(request_for()).todo == prepare(request_for(steps=3)).todo == ()


def test_overwrite_makes_again_under_the_same_name(request_for, tmp_path):
    run(prepare(request_for()))
    outcome = run(prepare(request_for(overwrite=True)))
    assert len(outcome.lines) == 1
    assert _names(tmp_path / "out") == ["0001-a-red-ball-seed0"]


def test_compares_with_dense_on_equal_footing(request_for, tmp_path):
    recorder = _Recorder()
    run(prepare(request_for("a", "b", compare_dense=True)), recorder)
    kinds = [(what, steps) for _, what, steps in recorder.renderings]
    assert kinds == [("warm-up", 2), ("warm-up", 1), *[("sparse", 2), ("dense", 2)] * 2]
    assert recorder.steps == sum(steps for _, steps in kinds)
    for line in _lines(tmp_path / "out"):
        assert line["speedup"] == pytest.approx(line["dense_seconds"] / line["seconds"])
        assert 5 < line["psnr"] < 100
        assert 0 < line["ssim"] < 1
        assert not line["identical"]


@pytest.mark.parametrize(
    ("warmup", "steps", "calls"),
    [
        # Of two layers and two branches; the first sparse step without a dense one before it is dense for its row sums.
        (0.0, 6, {"search": 4, "plan": 4, "reuse": 4}),
        (0.3, 6, {"warm-up": 8, "plan": 4, "reuse": 8}),
        (0.5, 2, {"warm-up": 4, "plan": 4}),
    ],
)
def test_the_warm_up_runs_all_that_the_method_does(request_for, monkeypatch, warmup, steps, calls):
    runs, plain = [], render.render_frames

    def watched(pipe, *arguments):
        found = plain(pipe, *arguments)
        records = [] if session_of(pipe) is None else statistics(pipe).records
        runs.append(Counter(r.reason or ("reuse" if r.planning is None else "plan") for r in records))
        return found

    monkeypatch.setattr(render, "render_frames", watched)
    config, recorder = ADASPA | {"warmup": warmup, "refresh": []}, _Recorder()
    run(prepare(request_for(steps=steps, config=config, compare_dense=True)), recorder)
    assert runs[0] == calls
    assert runs[1] == runs[3] == {}
    assert [(what, number) for _, what, number in recorder.renderings] == [
        ("warm-up", sum(calls.values()) // 4),
        ("warm-up", 1),
        ("sparse", steps),
        ("dense", steps),
    ]


def test_the_dense_video_and_the_trace_lie_beside_it(request_for, tmp_path):
    run(prepare(request_for("a", compare_dense=True, trace=True)))
    names = ["0001-a-seed0", "0001-a-seed0.dense", "0001-a-seed0.trace.json"]
    assert _names(tmp_path / "out") == names
    (line,) = _lines(tmp_path / "out")
    assert [line[key] for key in ("file", "dense_file", "trace")] == names
    run(prepare(request_for("a", out=tmp_path / "dense", config={"method": "dense"})))
    assert np.array_equal(_pixels(tmp_path / "out" / names[1]), _pixels(tmp_path / "dense" / names[0]))
    assert not np.array_equal(_pixels(tmp_path / "out" / names[0]), _pixels(tmp_path / "out" / names[1]))

    trace = json.loads((tmp_path / "out" / names[2]).read_text())
    assert [step["step"] for step in trace["steps"]] == [0, 1]
    calls = [action for track in trace["tracks"] for row in track["layers"] for action in row]
    assert len(calls) == line["calls"]
    density = sum(step["density"] for step in trace["steps"]) / 2
    assert density == pytest.approx(line["attention_density"])


def test_identical_frames_stay_valid_json(request_for, tmp_path):
    run(prepare(request_for(compare_dense=True, config={"method": "dense"})))
    (line,) = _lines(tmp_path / "out")
    assert line["identical"]
    assert line["psnr"] is None
    assert line["attention_density"] == 1


def test_a_comparison_asked_for_later_is_made(request_for, tmp_path):
    run(prepare(request_for()))
    job = prepare(request_for(compare_dense=True))
    assert len(job.todo) == 1
    run(job)
    assert _names(tmp_path / "out") == ["0001-a-red-ball-seed0", "0001-a-red-ball-seed0.dense"]
    assert prepare(request_for(compare_dense=True)).todo == ()
    assert prepare(request_for()).todo == ()


def test_restores_the_pipeline(request_for):
    job = prepare(request_for())
    before = dict(job.executor.renderer.pipe.transformer.attn_processors)
    run(job)
    assert dict(job.executor.renderer.pipe.transformer.attn_processors) == before


def test_an_interruption_keeps_what_is_finished(request_for, tmp_path):
    request = request_for("a", "b", "c")
    with pytest.raises(KeyboardInterrupt):
        run(prepare(request), _Recorder(interrupt_at=3))
    assert _names(tmp_path / "out") == ["0001-a-seed0"]
    job = prepare(request)
    assert [clip.prompt for clip in job.todo] == ["b", "c"]
    run(job)
    assert _names(tmp_path / "out") == ["0001-a-seed0", "0002-b-seed0", "0003-c-seed0"]


def test_a_failing_prompt_does_not_stop_the_others(request_for, tmp_path, monkeypatch):
    job = prepare(request_for("a", "bad", "c"))
    encode = type(job.executor.renderer.pipe).encode_prompt

    def failing(self, prompt, **options):
        if prompt == "bad":
            raise RuntimeError("no such luck")
        return encode(self, prompt, **options)

    monkeypatch.setattr(type(job.executor.renderer.pipe), "encode_prompt", failing)
    recorder = _Recorder()
    outcome = run(job, recorder)
    assert recorder.failures == [(2, "no such luck")]
    assert [clip.index for clip, _ in outcome.failures] == [2]
    assert _names(tmp_path / "out") == ["0001-a-seed0", "0003-c-seed0"]


def test_frames_that_are_not_finite_are_a_failure(request_for, tmp_path):
    job = prepare(request_for())
    job.executor.renderer.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    ((_, error),) = run(job).failures
    assert "NaN" in str(error)
    assert _names(tmp_path / "out") == []


def test_a_full_disk_ends_the_run(request_for, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(render, "write_partial", full)
    recorder = _Recorder()
    with pytest.raises(OSError, match="No space"):
        run(prepare(request_for("a", "b")), recorder)
    assert len(recorder.renderings) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 65}, "height"),
        ({"frames": 8}, "frames"),
        ({"config": {"method": "neighborhood", "window": [99, 99, 99]}}, "window"),
        ({"config": {"method": "adaspa", "densty": 0.2}}, "density"),
        ({"dtype": "int8"}, "--dtype must be"),
        ({"device": "tpu"}, "--device must be"),
        ({"offload": "moon"}, "offload must be"),
        ({"model": "/nowhere"}, "model"),
    ],
)
def test_checks_before_anything_is_written(request_for, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare(request_for(**changes))
    assert not list(tmp_path.iterdir())


def test_sizes_left_open_are_the_pipelines_own(request_for):
    with pytest.raises(ValueError, match="steps"):
        request_for(steps=0)
    job = prepare(request_for(height=None, width=None, frames=None, steps=None, guidance=None))
    settings = job.settings
    assert (settings.height, settings.width, settings.frames, settings.steps) == (480, 832, 81, 50)
    assert settings.guidance == 5.0


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "a" / "b")
    check_folder(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "b", Path("/proc/x"), tmp_path / ("x" * 300)):
        with pytest.raises(ValueError, match="cannot be written"):
            check_folder(folder)
    assert os.listdir(tmp_path) == ["file"]
