"""`dit-sparse generate`."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_sparse import preset
from dit_sparse.cli import main
from tests.cli.command import SMALL, assert_refused, exit_code, prompts_file, tree
from tests.pipelines.tiny_families import tiny_flux
from tests.processes import FORKSERVER, left_by


def test_generates_reports_and_resumes(model, capsys):
    command = ["generate", prompts_file("# two", "a red ball", "a blue square"), "--model", model, *SMALL]
    command += ["--density", "0.3", "--block=8", "--warmup", "0.5", "--num-samples", "2", "--out", "out"]
    command += ["--remainder", "mean"]
    assert exit_code(*command) == 0
    output = capsys.readouterr().out
    assert "4 made, of 4, in out" in output
    assert "warm-up" in output
    lines = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == [
        *("0001-a-red-ball-seed0.mp4", "0001-a-red-ball-seed1.mp4"),
        *("0002-a-blue-square-seed0.mp4", "0002-a-blue-square-seed1.mp4"),
    ]
    assert all(Path("out", line["file"]).stat().st_size for line in lines)
    assert lines[0]["config"]["warmup"] == 0.5
    assert lines[0]["config"]["block"] == 8
    assert lines[0]["config"]["remainder"] == "mean"

    before = {path: path.stat().st_mtime_ns for path in tree(Path("out"))}
    assert exit_code(*command) == 0
    assert "4 of 4 already done" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in tree(Path("out"))} == before


def test_compare_dense_with_a_config_file_and_standard_input(model, capsys, monkeypatch):
    Path("config.json").write_text('{"method": "adaspa", "density": 0.5, "block": 8, "warmup": 0}')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a ball\n")))
    command = ["generate", "-", "--model", model, *SMALL, "--config", "config.json", "--density", "0.2"]
    assert exit_code(*command, "--compare-dense", "--format", "gif") == 0
    output = capsys.readouterr().out
    assert "speed-" in output
    assert "PSNR" in output
    (line,) = [json.loads(line) for line in Path("videos/manifest.jsonl").read_text().splitlines()]
    assert line["config"]["density"] == 0.2
    assert line.keys() >= {"dense_seconds", "speedup", "psnr", "ssim"}


def test_no_strict_lets_a_layer_run_dense(model, capsys):
    command = ["generate", "--prompt", "a ball", "--model", model, *SMALL, "--block", "64", "--warmup", "0"]
    assert exit_code(*command) == 1
    assert "NotSparseError: layer 0 would run dense" in capsys.readouterr().err
    assert exit_code(*command, "--no-strict") == 0
    (line,) = [json.loads(line) for line in Path("videos/manifest.jsonl").read_text().splitlines()]
    assert line["config"]["strict"] is False


def test_an_image_model_writes_png(tmp_path, capsys):
    tiny_flux().save_pretrained("flux")
    command = ["generate", prompts_file("a red ball", "a blue square"), "--model", "flux", "--device", "cpu"]
    command += ["--height", "32", "--width", "48", "--steps", "2", "--block", "16", "--out", "out"]
    assert exit_code(*command) == 0
    assert "2 made, of 2, in out" in capsys.readouterr().out
    names = ["0001-a-red-ball-seed0.png", "0002-a-blue-square-seed0.png"]
    assert sorted(path.name for path in Path("out").glob("*.png")) == names
    assert exit_code(*command) == 0
    assert "2 of 2 already done" in capsys.readouterr().out
    for option, message in (("--frames", "--frames must be 1"), ("--height", "height must be a multiple of 2")):
        assert_refused(tmp_path, capsys, [*command, option, "33"], message)
    assert_refused(tmp_path, capsys, [*command, "--format", "gif"], "--format must be png")


def test_a_checkpoint_takes_its_preset(capsys):
    """Recognised by the folder's name; here a tiny model bears it."""
    tiny_flux().save_pretrained("FLUX.1-schnell")
    command = ["generate", "--prompt", "a red ball", "--model", "FLUX.1-schnell", "--height", "32", "--width", "48"]

    def made(*options: str) -> tuple[str, dict]:
        assert exit_code(*command, "--device", "cpu", *options) == 0
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preset")]
        return line, json.loads(Path("videos/manifest.jsonl").read_text().splitlines()[-1])

    said, line = made()
    assert said.startswith(
        "preset flux.1-schnell: neighborhood, density 0.5, warm-up 0.25, dense layers none; its size"
    )
    assert line["config"] == preset("flux.1-schnell").to_config()
    assert (line["steps"], line["guidance"], line["format"]) == (4, 0.0, "png")
    assert line["dense_calls"] == {"warm-up": 2}
    said, line = made("--density", "0.25", "--steps", "2")
    assert (line["config"]["method"], line["config"]["density"], line["steps"]) == ("neighborhood", 0.25, 2)
    assert line["config"]["warmup"] == 0.25
    said, line = made("--method", "adaspa", "--block", "16")
    assert said.startswith("preset flux.1-schnell: size, steps and guidance where no option says otherwise")
    assert (line["config"]["method"], line["config"]["warmup"], line["steps"]) == ("adaspa", 0.2, 4)
    Path("config.json").write_text('{"method": "dense"}')
    assert made("--config", "config.json")[1]["config"]["method"] == "dense"


def test_the_demo_model_takes_its_preset(capsys):
    command = ["generate", "--prompt", "a red ball", "--height", "32", "--width", "32", "--frames", "5", "--steps", "2"]
    assert exit_code(*command, "--never-slower", "false") == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("preset")]
    assert said.startswith("preset demo: lea, density")
    line = json.loads(Path("videos/manifest.jsonl").read_text())
    assert line["config"] == replace(preset("demo"), never_slower=False).to_config()
    assert (line["model"], line["guidance"], line["dense_calls"]) == ("demo", 3.5, {})


def test_a_failing_prompt_gives_exit_code_1(model, capsys, monkeypatch):
    from diffusers import WanPipeline

    def failing(*_, **__):
        raise RuntimeError("no [luck]")

    monkeypatch.setattr(WanPipeline, "encode_prompt", failing)
    assert exit_code("generate", "--prompt", "a", "--model", model, *SMALL) == 1
    captured = capsys.readouterr()
    assert "failed: 0001-a-seed0: RuntimeError: no [luck]" in captured.err
    assert "0 made, 1 failed" in captured.out


def _damaged(model: str, path: str, data: bytes) -> str:
    """A copy of the model with one file damaged."""
    import shutil

    copy = Path("damaged")
    shutil.copytree(model, copy)
    (copy / path).write_bytes(data)
    return str(copy)


BAD_OPTIONS = [
    (["--parallel", "2"], "--parallel must be such as ulysses=2"),
    (["--parallel", "ring=1"], "--parallel must name at least 2 ranks"),
    (["--parallel", "ulysses=2", "--ray", "moon"], "--ray must be auto, local or HOST:PORT|pip install"),
    (["--parallel", "ulysses=2", "--ray-workers", "2"], "--ray-workers needs --ray"),
    (["--parallel", "ulysses=2", "--offload", "model"], "--offload must be none with --parallel"),
    (["--method", "adasp"], "adaspa"),
    (["--density", "0"], "density must be above 0"),
    (["--density", "-0.5"], "density must be above 0"),
    (["--density", "1.5"], "at most 1"),
    (["--density", "nan"], "density"),
    (["--method", "neighborhood", "--window", "99x99x99"], "window"),
    (["--method", "neighborhood", "--window", "4x4"], "window"),
    (["--windw", "4x4x4"], "no such option: --windw"),
    (["--hieght", "64"], "did you mean --height"),
    (["--warmup", "7"], "warmup"),
    (["--remainder", "maen"], "--remainder must be one of method, none, mean, value, mass, got 'maen'"),
    (["--block"], "no value"),
    (["--height", "63"], "height"),
    (["--width", "0"], "--width must be at least 1"),
    (["--frames", "8"], "frames"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--steps", "many"], "--steps"),
    (["--num-samples", "0"], "--num-samples must be at least 1"),
    (["--seed", "-1"], "--seed must be"),
    (["--guidance", "inf"], "--guidance must be"),
    (["--guidance", "nan"], "--guidance must be"),
    (["--fps", "0"], "--fps must be"),
    (["--format", "avi"], "--format must be one of mp4, gif, png"),
    (["--dtype", "int8"], "--dtype must be"),
    (["--device", "abacus"], "--device must be"),
    (["--device", "meta"], "--device must be"),
    (["--offload", "moon"], "offload"),
    (["--out", "file.txt"], "--out 'file.txt' cannot be written"),
    (["--out", "file.txt/videos"], "cannot be written"),
    (["--out", "/proc/videos"], "cannot be written"),
    (["--config", "none.json"], "no such config file"),
    (["--config", "broken.json"], "not valid JSON"),
    (["--config", "unknown.json"], "density"),
    (["--config", "zero.json"], "density must be above 0"),
    (["--ray-workers", "2"], "--ray-workers needs --ray"),
    (["--ray", "moon"], "--ray must be auto, local or HOST:PORT|pip install 'dit-sparse[ray]'"),
    (["--model", "none/at/all"], "model"),
    (["--model", "empty"], "model_index.json"),
    (["--model", "family"], "StableDiffusionPipeline|not supported|supported"),
    (["--prompt", "x"], "not both"),
    (["other.txt"], "one prompt file"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda value: " ".join(value)[:40])
def test_bad_options_give_one_line_and_write_nothing(model, tmp_path, capsys, options, message):
    Path("file.txt").touch()
    Path("broken.json").write_text('{"density": 0.2')
    Path("unknown.json").write_text('{"method": "adaspa", "densty": 0.2}')
    Path("zero.json").write_text('{"method": "adaspa", "density": 0}')
    Path("empty").mkdir()
    Path("family").mkdir()
    Path("family/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0"}')
    command = ["generate", prompts_file("a red ball"), "--model", model, *SMALL, *options]
    assert_refused(tmp_path, capsys, command, message)


def test_ray_under_torchrun_is_refused(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = ["generate", "--prompt", "a", "--model", model, "--ray", "auto", "--parallel", "ulysses=2"]
    assert_refused(tmp_path, capsys, command, "give the command without torchrun")


@pytest.mark.parametrize("ray", [[], ["--ray", "auto"]], ids=["ranks", "ray"])
def test_more_ranks_than_heads_are_refused_before_anything_is_started(model, tmp_path, capsys, monkeypatch, ray):
    for start in ("generate.ranks.launch", "generate.on_ray.RayExecutor", "generate.models.load_model"):
        monkeypatch.setattr(f"dit_sparse.{start}", lambda *_: pytest.fail("starts ranks first"))
    command = ["generate", "--prompt", "a", "--model", model, *SMALL, "--parallel", "ulysses=64", *ray]
    assert_refused(tmp_path, capsys, command, "ulysses must be at most the model's 2 heads, got 64")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_cuda_without_a_gpu_says_so(model, tmp_path, capsys):
    command = ["generate", "--prompt", "a", "--model", model, *SMALL, "--device", "cuda"]
    assert_refused(tmp_path, capsys, command, "finds no GPU")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no such prompt file"),
        (b"", "no prompt"),
        (b"# nothing\n\n", "no prompt"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "line 1"),
        ("ein Bär".encode("latin-1"), "line 1: byte 0xe4 is not UTF-8"),
    ],
)
def test_bad_prompt_files(model, tmp_path, capsys, data, message):
    if data is not None:
        Path("prompts.txt").write_bytes(data)
    assert_refused(tmp_path, capsys, ["generate", "prompts.txt", "--model", model, *SMALL], message)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", b"garbage"),
        ("transformer/config.json", b"{"),
        ("model_index.json", b"{"),
        ("vae/config.json", b"\xff\xff"),
        ("text_encoder/model.safetensors", b""),
    ],
)
def test_damaged_models(model, tmp_path, capsys, path, data):
    command = ["generate", "--prompt", "a", "--model", _damaged(model, path, data), *SMALL]
    assert_refused(tmp_path, capsys, command, "damaged")


def test_interruption_while_loading(model, capsys, monkeypatch):
    from dit_sparse.generate import models

    def interrupt(request):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupt)
    assert exit_code("generate", "--prompt", "a", "--model", model, *SMALL) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted")
    assert not list(Path().iterdir())


def _refused_meanwhile(pid: int, command: list[str], capsys: pytest.CaptureFixture) -> None:
    """A second run is told that the process has the folder."""
    os.kill(pid, signal.SIGSTOP)  # so that it is not done meanwhile
    assert exit_code(*command) == 2
    os.kill(pid, signal.SIGCONT)
    assert f"--out 'out' is in use by process {pid} on {socket.gethostname()}" in capsys.readouterr().err


def _interrupted(command: list[str], capsys: pytest.CaptureFixture) -> None:
    """Start a process, and tell it to stop when it has made a video."""

    def default_interrupt():
        # A test run in the background may ignore SIGINT, and children inherit that.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "dit_sparse", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_interrupt,
    )
    _wait_for_a_video(lambda: process.poll() is None)
    _refused_meanwhile(process.pid, command, capsys)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not list(Path("out").glob(".*"))


def _killed(command: list[str], capsys: pytest.CaptureFixture) -> None:
    """Start a process, and kill it when it has made a video."""
    process = FORKSERVER.Process(target=main, args=(command,))
    process.start()
    _wait_for_a_video(process.is_alive)
    _refused_meanwhile(process.pid, command, capsys)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    # What a kill in the middle of the encoding leaves, which is too short to be hit for sure.
    Path("out", left_by(process.pid, "0002-a-red-ball-1-seed0.mp4")).write_bytes(b"half")


def _finished() -> list[Path]:
    # pathlib's `*` takes in hidden files too.
    return sorted(path for path in Path("out").glob("*.mp4") if not path.name.startswith("."))


def _wait_for_a_video(runs: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not _finished() and time.monotonic() < deadline and runs():
        time.sleep(0.01)
    assert runs()


@pytest.mark.parametrize("stop", [_killed, _interrupted], ids=["SIGKILL", "SIGINT"])
def test_goes_on_where_it_was_stopped(model, capsys, stop):
    prompts = prompts_file(*(f"a red ball {n}" for n in range(4)))
    command = ["generate", prompts, "--model", model, *SMALL, "--out", "out", "--steps", "40", "--block", "8"]
    stop(command, capsys)
    finished = {path: path.stat().st_mtime_ns for path in _finished()}
    assert 0 < len(finished) < 4

    assert exit_code(*command) == 0
    assert f"{4 - len(finished)} made, {len(finished)} already done, of 4" in capsys.readouterr().out
    assert len(_finished()) == 4
    assert not list(Path("out").glob(".*"))
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())
    assert len(Path("out/manifest.jsonl").read_text().splitlines()) == 4
