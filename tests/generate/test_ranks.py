"""One request on several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_sparse.generate import Request, prepare, run
from dit_sparse.generate.request import Degrees
from dit_sparse.lost_ranks import RankLostError
from tests.parallel import cases
from tests.parallel.ranks import Ranks
from tests.pipelines.tiny import tiny_wan
from tests.processes import children

BAD = ("", "2", "ulysses", "ulysses=0", "ulysses=-2", "ulysses=2,ulysses=2", "rings=2", "ring=1.5")
PROMPTS = ("a red ball", "a blue square", "a green ball")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "wan"
    tiny_wan(heads=4).save_pretrained(path)
    return path


def request(folder: Path, out: Path, **options) -> Request:
    options = {"method": "adaspa", "density": 0.5, "block": 8, "parallel": None, "prompts": PROMPTS} | options
    config = {name: options.pop(name) for name in ("method", "density", "block")}
    size = {"height": 64, "width": 64, "frames": 9, "steps": 3, "guidance": 3.0}
    return Request(config=config, out=out, model=str(folder), device="cpu", **size, format="png", **options)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text("utf-8").splitlines()]


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {str(path.relative_to(out)): np.asarray(Image.open(path), int) for path in sorted(out.rglob("*.png"))}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("ulysses=2", Degrees(2)),
        ("ring=4", Degrees(1, 4)),
        ("ulysses=2,ring=3,timeout=60", Degrees(2, 3, 60)),
        ("ring=2, ulysses=2", Degrees(2, 2)),
    ],
)
def test_degrees(text: str, want: Degrees) -> None:
    assert Degrees.of(text) == want


@pytest.mark.parametrize("text", BAD)
def test_bad_degrees(text: str) -> None:
    with pytest.raises(ValueError, match="--parallel must be such as ulysses=2"):
        Degrees.of(text)


def test_one_rank_is_not_parallel(tmp_path) -> None:
    with pytest.raises(ValueError, match="--parallel must name at least 2 ranks, got 'ulysses=1'"):
        request(tmp_path, tmp_path, parallel="ulysses=1")
    with pytest.raises(ValueError, match="--offload must be none with --parallel, got model"):
        request(tmp_path, tmp_path, parallel="ulysses=2", offload="model")


def test_ranks_make_what_one_process_makes(ranks: Ranks, folder: Path, tmp_path) -> None:
    run(prepare(request(folder, tmp_path / "alone", prompts=PROMPTS[:2])))
    options = {"prompts": PROMPTS[:2], "parallel": "ulysses=2,ring=2", "compare_dense": True}
    parallel = request(folder, tmp_path / "four", **options)
    results = ranks.run(cases.generate, parallel)
    assert results == [{"made": 2, "failed": 0}, None, None, None]
    got, want = pixels(tmp_path / "four"), pixels(tmp_path / "alone")
    assert {name for name in got if ".dense/" not in name} == want.keys()
    assert max(np.abs(got[name] - want[name]).max() for name in want) <= 1, "more than rounding differs"
    for line, other in zip(lines_of(tmp_path / "four"), lines_of(tmp_path / "alone"), strict=True):
        assert line["parallel"] == "ulysses=2,ring=2"
        assert line["key"] == other["key"]
        assert line["sparse_density"] == pytest.approx(other["sparse_density"])
        assert line["psnr"] < 60
        assert line["dense_calls"] == other["dense_calls"]
    assert not list((tmp_path / "four").glob("*partial*"))
    assert ranks.run(cases.generate, parallel)[0] == {"made": 0, "failed": 0}, "finished videos are not made twice"


def test_a_prompt_that_fails_on_all_ranks_fails_alone(ranks: Ranks, folder: Path, tmp_path) -> None:
    parallel = request(folder, tmp_path, parallel="ulysses=4")
    assert ranks.run(cases.generate, parallel, poison="a blue square") == [{"made": 2, "failed": 1}, None, None, None]


def test_ranks_that_fail_unlike_end_together(folder: Path, tmp_path) -> None:
    four = Ranks(4)
    try:
        results = four.run(
            cases.generate, request(folder, tmp_path, parallel="ulysses=4,timeout=5"), poison="a blue square", rank=2
        )
    finally:
        four.stop()
    assert all(isinstance(result, RankLostError) for result in results)
    assert "rank 2 failed and others did not, so they no longer fit together: RuntimeError: poisoned" in str(results[2])
    assert len(lines_of(tmp_path)) == 1, "what was finished before stays"


def test_the_command_starts_its_ranks_and_tells_of_a_killed_one(folder: Path, tmp_path) -> None:
    out = tmp_path / "videos"
    options = f"--model {folder} --device cpu --steps 3 --height 64 --width 64 --frames 9 --method adaspa --block 8"
    options += f" --format png --num-samples 500 --parallel ulysses=2,timeout=30 --out {out}"
    command = [sys.executable, "-m", "dit_sparse", "generate", "--prompt", "a red ball", *options.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        end = time.monotonic() + 200
        while not (out / "manifest.jsonl").exists() and started.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
        os.kill(children(started.pid)[-1], signal.SIGKILL)
        _, errors = started.communicate(timeout=60)
    finally:
        started.kill()
    assert started.returncode == 1
    assert "was killed by SIGKILL; the others were ended, and the same command goes on" in errors
    for line in lines_of(out)[:-1]:
        assert (out / line["file"]).exists()
