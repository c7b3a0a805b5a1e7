"""`dit-sparse compare` and `fidelity`."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.cli import main
from dit_sparse.compare.render import Stage
from dit_sparse.compare.run import _Runner
from dit_sparse.generate import Request, hold
from tests.cli.command import SMALL, assert_refused, exit_code, prompts_file, tree
from tests.eval.videos import write_video
from tests.pipelines.tiny_families import tiny_flux
from tests.processes import FORKSERVER, left_by


def command(model, *options):
    given = ["--model", model, *SMALL, "--frames", "5", "--warmup", "0.5", "--format", "gif", "--out", "out"]
    return ["compare", prompts_file("a red ball", "a blue square"), *given, *options]


def record():
    return json.loads(Path("out/compare.json").read_text())


def test_compares_draws_and_prints(model, capsys):
    Path("plan.json").write_text(
        '{"methods": [{"method": "oracle", "block": 8}, {"method": "adaspa", "block": 8, "label": "mine"}],'
        '"densities": [0.5]}'
    )
    assert exit_code(*command(model, "--config", "plan.json", "--no-floors", "--num-samples", "1", "--trace")) == 0
    output = capsys.readouterr()
    assert "6 of 6: mine, prompt 2, seed 0:" in output.err
    assert "out/pareto.svg" in output.out
    (row,) = [line for line in output.out.splitlines() if line.startswith("mine")]
    (found,) = [row for row in record()["summary"] if row["label"] == "mine"]
    assert row.split() == [
        *("mine", "2", f"{found['sparse_density']:.3f}", f"{found['achieved_density']:.3f}", f"{found['seconds']:.2f}"),
        *(f"{found['speedup']:.2f}x", f"{found['psnr']:.2f}", f"{found['psnr_min']:.2f}"),
        *(f"{found['ssim']:.4f}", f"{found['ssim_min']:.4f}"),
    ]
    for line in record()["runs"]:
        assert ("trace" in line) is (line["kind"] == "method")
        if "trace" in line:
            trace = json.loads(Path("out", line["trace"]).read_text())
            densities = [step["density"] for step in trace["steps"]]
            assert sum(densities) / len(densities) == pytest.approx(line["achieved_density"])
    assert exit_code("report", "out", "--out", "report.html") == 0
    assert "mine" in Path("report.html").read_text()
    capsys.readouterr()
    files = ["compare.csv", "compare.json", "pareto.png", "pareto.svg", "reference", "videos"]
    assert sorted(path.name for path in Path("out").iterdir()) == files

    before = {path: path.read_bytes() for path in tree(Path("out")) if path.is_file()}
    for name in ("pareto.png", "pareto.svg"):
        Path("out", name).unlink()
    shutil.rmtree("out/videos")
    assert exit_code("compare", "--draw-only", "--out", "out") == 0
    assert capsys.readouterr().out == output.out
    assert {path: path.read_bytes() for path in tree(Path("out")) if path.is_file()} == {
        path: data for path, data in before.items() if "videos" not in path.parts
    }


BAD = [
    (["--methods", "adasp"], "did you mean 'adaspa'"),
    (["--methods", "adaspa", "--densities", "0.5,0"], "density must be above 0 and at most 1, got 0.0"),
    (["--methods", "adaspa", "--densities", "1.5"], "density must be above 0 and at most 1, got 1.5"),
    (["--methods", "adaspa", "--densities", "half"], "--densities must be numbers with commas between"),
    (["--methods", "dense", "--densities", "0.5"], "method 'dense' as it is set takes no density"),
    (["--methods", ","], "no methods: give --methods"),
    ([], "no methods: give --methods"),
    (["--methods", "adaspa,adaspa"], "two cases of one label: 'adaspa 0.25' and 'adaspa 0.25'"),
    (["--methods", "adaspa", "--densities", "0.5,0.5"], "two cases of one label"),
    (["--also", "{"], "--also must be JSON"),
    (["--methods", "dense"], "two cases of one label: 'dense' and 'dense'"),
    (["--also", '{"method": "adaspa", "label": "another seed"}'], "'another seed' and 'another seed'"),
    (["--also", "[]"], "--also must be an object"),
    (["--also", '{"method": "adaspa", "densty": 1}'], "did you mean 'density'"),
    (["--also", '{"density": 0.5}'], 'must be an object with a "method"'),
    (["--config", "none.json"], "no such config file"),
    (["--config", "key.json"], "unknown key 'method'; did you mean 'methods'"),
    (["--config", "names.json"], '"methods" must be a list'),
    (["--methods", "adaspa", "--warmup", "2"], "warmup must be from 0 to 1"),
    (["--methods", "adaspa", "--conventions", "vbench"], "convention must be one of skimage, svg, fastvideo"),
    (["--methods", "adaspa", "--num-samples", "0"], "--num-samples must be at least 1"),
    (["--methods", "adaspa", "--fps", "0"], "--fps must be at least 1"),
    (["--methods", "adaspa", "--prompt", "x"], "not both"),
    (["--methods", "adaspa", "--height", "63"], "height"),
    (["--methods", "adaspa", "--lpips"], "LPIPS needs"),
    (["--methods", "adaspa", "--out", "/proc/x"], "cannot be written"),
    (["--draw-only"], "no comparison in out"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_options_give_one_line_and_write_nothing(model, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "nothing"))
    Path("key.json").write_text('{"method": "adaspa"}')
    Path("names.json").write_text('{"methods": "adaspa"}')
    assert_refused(tmp_path, capsys, command(model, *options), message)


def test_prompts_alike_are_refused(model, tmp_path, capsys):
    prompts = prompts_file("a red ball", "a ball", "a red ball")
    arguments = ["compare", prompts, "--methods", "adaspa", "--model", model, *SMALL, "--out", "out"]
    assert_refused(tmp_path, capsys, arguments, "two prompts alike: 'a red ball'")


def test_an_image_model(capsys):
    tiny_flux().save_pretrained("flux")
    arguments = ["compare", "--prompt", "a red ball", "--model", "flux", "--device", "cpu", "--height", "32"]
    arguments += ["--width", "48", "--steps", "2", "--also", '{"method": "adaspa", "block": 16, "density": 0.5}']
    assert exit_code(*arguments, "--warmup", "0", "--out", "out") == 0
    for line in record()["runs"]:
        assert Path("out", line["video"]).suffix == Path("out", line["reference"]).suffix == ".png"
        with Image.open(Path("out", line["video"])) as image:
            assert image.size == (48, 32)
    shutil.rmtree("out/videos")
    assert exit_code(*arguments, "--warmup", "0", "--out", "out") == 0
    assert {line["session"] for line in record()["runs"]} == {2}


def test_an_interruption_keeps_what_is_finished(model, capsys, monkeypatch):
    render, renderings = Stage.render, []

    def interrupted(self, schedule, prompt, seed, **options):
        if len(renderings) == 2:
            raise KeyboardInterrupt
        renderings.append(prompt)
        return render(self, schedule, prompt, seed, **options)

    monkeypatch.setattr(Stage, "render", interrupted)
    arguments = command(model, "--also", '{"method": "adaspa", "block": 8}', "--no-floors")
    assert exit_code(*arguments) == 130
    captured = capsys.readouterr()
    assert captured.err.splitlines()[-1].startswith("interrupted; finished runs are in out")
    assert captured.out == ""
    assert len(record()["runs"]) == 2
    monkeypatch.setattr(Stage, "render", render)
    assert exit_code(*arguments) == 0
    assert "made in 2 sessions" in capsys.readouterr().out


def test_a_case_that_fails_gives_exit_code_1_and_a_full_disk_too(model, capsys, monkeypatch):
    render = Stage.render

    def failing(self, schedule, prompt, seed, **options):
        if schedule is not None:
            raise RuntimeError("no [luck]")
        return render(self, schedule, prompt, seed, **options)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Stage, "render", failing)
    arguments = command(model, "--also", '{"method": "adaspa", "block": 8}', "--no-floors")
    assert exit_code(*arguments) == 1
    captured = capsys.readouterr()
    assert "failed: adaspa 0.25 block=8, prompt 1, seed 0: RuntimeError: no [luck]" in captured.err
    assert "failed: adaspa 0.25 block=8: 'a red ball': RuntimeError: no [luck]" in captured.out
    monkeypatch.setattr(Stage, "render", render)
    monkeypatch.setitem(_Runner._write.__globals__, "write_video", full)
    assert exit_code(*arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: out cannot be written: [Errno 28] No space left on device"
    assert {line["kind"] for line in record()["runs"]} == {"dense"}


def _lines():
    return record()["runs"] if Path("out/compare.json").exists() else []


def test_a_folder_in_use_is_left_alone(model, tmp_path, capsys):
    again = command(model, "--methods", "adaspa")
    with hold(Request(("a ball",), {}, Path("out"))):
        assert_refused(tmp_path, capsys, again, f"--out 'out' is in use by process {os.getpid()} on")


def test_goes_on_where_it_was_killed(model, capsys):
    """The process is killed in the middle of its second prompt, and a run that is not recorded is done again."""
    arguments = command(model, "--also", '{"method": "adaspa", "block": 8}', "--densities", "0.5,0.3", "--no-floors")
    arguments += ["--steps", "4"]
    process = FORKSERVER.Process(target=main, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 200
    while len(_lines()) < 4:
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    before = _lines()
    assert 4 <= len(before) < 6
    finished = {path: path.stat().st_mtime_ns for line in before for path in tree(Path("out", line["video"]).parent)}
    named = {Path("out", line[name]) for line in before for name in ("video", "reference")}
    # What a kill in the middle of writing leaves, which is too short to be hit for sure.
    Path("out", "videos", left_by(process.pid, "x.gif")).write_bytes(b"half")
    Path("out", "compare.json.tmp").write_bytes(b"{")

    assert exit_code(*arguments) == 0
    error = capsys.readouterr().err
    assert f"{len(before)} of 6 already done" in error
    assert sum(" of 6: " in line for line in error.splitlines()) == 6 - len(before)
    after = _lines()
    assert after[: len(before)] == before
    assert len(after) == 6
    assert {line["session"] for line in after[len(before) :]} == {2}
    assert len({(line["prompt"], line["reference_sha256"]) for line in after}) == 2
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items() if path in named)
    assert not list(Path("out/videos").glob(".*"))
    assert len(list(Path("out/videos").iterdir())) == 6


def _clip(folder, noise=0, size=(24, 32), frames=3):
    rng = np.random.default_rng(0)
    pixels = rng.integers(40, 200, (frames, *size, 3)) + noise
    Path(folder).mkdir()
    for number, frame in enumerate(pixels.astype(np.uint8)):
        Image.fromarray(frame).save(Path(folder, f"{number:04d}.png"))


def test_fidelity_of_two_folders(capsys):
    _clip("a")
    _clip("b", noise=10)
    assert exit_code("fidelity", "a", "b", "--convention", "svg,skimage") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 frames of 24x32; 3 PNG files and 3 PNG files"
    assert [line.split(":")[0] for line in lines[1:]] == ["svg", "skimage"]
    assert "PSNR 28.1308 dB" in lines[1]  # 20 log10(255 / 10)
    assert exit_code("fidelity", "a", "a", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identical"]
    assert found["identical_frames"] == found["frames"] == 3
    assert (found["fidelity"]["skimage"]["psnr"], found["size"]) == (None, [32, 24])
    assert exit_code("fidelity", "a", "a") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "identical"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"frames": 2}, "must have one number of frames, got 3 and 2"),
        ({"size": (24, 30)}, "must have one size, got 32x24 and 30x24"),
        (None, "no such video, image or folder: b"),
    ],
)
def test_fidelity_refuses_what_is_no_pair(tmp_path, capsys, other, message):
    _clip("a")
    if other is not None:
        _clip("b", **other)
    assert_refused(tmp_path, capsys, ["fidelity", "a", "b"], message)


def test_fidelity_of_videos(tmp_path, capsys):
    write_video(Path("a.mkv"), "ffv1", "bgr0")
    write_video(Path("lossy.mp4"), "libx264", "yuv444p")
    write_video(Path("fast.mkv"), "ffv1", "bgr0", fps=24)
    Path("broken.mkv").write_bytes(b"broken")
    assert exit_code("fidelity", "a.mkv", "a.mkv") == 0
    assert "ffv1, bgr0" in capsys.readouterr().out
    assert_refused(
        tmp_path, capsys, ["fidelity", "a.mkv", "fast.mkv"], "must have one frames a second, got 16.0 and 24.0"
    )
    assert_refused(tmp_path, capsys, ["fidelity", "a.mkv", "lossy.mp4"], "or --allow-lossy")
    assert_refused(tmp_path, capsys, ["fidelity", "a.mkv", "broken.mkv"], "broken.mkv cannot be read as a video")
    assert exit_code("fidelity", "a.mkv", "lossy.mp4", "--allow-lossy") == 0
    assert "lossy: the figures measure the codec too" in capsys.readouterr().out
