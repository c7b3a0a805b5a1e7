"""A comparison on a tiny model: what is recorded, and what is not done again."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_sparse import Schedule, load_pipeline, sparsify
from dit_sparse.compare import Listener, make_cases, read_record, run
from dit_sparse.compare.render import Stage
from dit_sparse.eval import compare, find_convention
from dit_sparse.eval.frames import read_clip
from dit_sparse.generate import Request
from dit_sparse.generate.video import to_uint8
from dit_sparse.report import load
from tests.compare.conftest import PROMPTS, SCHEDULE, SMALL, compare_into
from tests.processes import left_by

LABELS = ["dense", "adaspa 0.6 block=8", "adaspa 0.3 block=8", "another seed", "random blocks 0.3"]


def runs_of(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    record = read_record(folder)
    found = {(run["label"], run["prompt"]): run for run in record["runs"]}
    assert len(found) == len(record["runs"])
    return found


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("a video was rendered")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished comparison."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_every_run_is_there_with_what_it_did(finished: Path) -> None:
    found = runs_of(finished)
    assert list(found) == [(label, prompt) for prompt in PROMPTS for label in LABELS]
    for (label, prompt), line in found.items():
        dense = found["dense", prompt]
        assert line["speedup"] == pytest.approx(dense["seconds"] / line["seconds"])
        assert line["dense_seconds"] == dense["seconds"]
        assert line["reference_sha256"] == dense["reference_sha256"]
        assert line["frames"] == 5
        assert line["session"] == 1
        assert (finished / line["video"]).is_file()
        assert list(line["fidelity"]) == ["skimage", "svg", "fastvideo"]
        assert {"psnr": line["psnr"], "ssim": line["ssim"]} == line["fidelity"]["skimage"]
        assert line["identical"] is (label == "dense")
        assert line["noise_seed"] == (1 if label == "another seed" else 0)
    dense, sparse = found["dense", PROMPTS[0]], found[LABELS[2], PROMPTS[0]]
    assert (dense["psnr"], dense["ssim"], dense["speedup"], dense["config"]) == (None, 1.0, 1.0, None)
    assert (sparse["kind"], sparse["method"], sparse["density"]) == ("method", "adaspa", 0.3)
    assert sparse["config"]["warmup"] == 0.3
    assert sparse["dense_calls"] == {"warm-up": 8}  # two of four steps, two layers, two branches
    assert 0.2 < sparse["sparse_density"] < sparse["achieved_density"] < 1
    assert dense["receipts"] is None  # plain diffusers, which nobody counts
    receipts = sparse["receipts"]["transformer"]
    assert (receipts["layer"], receipts["calls"]) == ([0, 1], [8, 8])
    assert receipts["dense"] == {"warm-up": [4, 4]}
    assert sum(receipts["density"]) / 2 == pytest.approx(sparse["achieved_density"], abs=1e-4)
    assert found[LABELS[4], PROMPTS[0]]["config"]["method"] == "random-blocks"
    assert read_record(finished)["failed"] == []


def test_traces_lie_beside_the_videos(request_of: Request, tmp_path: Path) -> None:
    chosen = make_cases([SMALL], [0.3], SCHEDULE)
    run(compare_into(request_of, tmp_path / "out", chosen, prompts=PROMPTS[:1], trace=True))
    dense, sparse = read_record(tmp_path / "out")["runs"]
    assert "trace" not in dense
    assert sparse["trace"] == sparse["video"].removesuffix(".gif") + ".trace.json"
    trace = json.loads((tmp_path / "out" / sparse["trace"]).read_text("utf-8"))
    density = sum(step["density"] for step in trace["steps"]) / len(trace["steps"])
    assert density == pytest.approx(sparse["achieved_density"])
    assert load(tmp_path / "out").groups[0].runs[1].trace == tmp_path / "out" / sparse["trace"]


def test_figures_are_those_of_the_pipeline(finished: Path, model: str) -> None:
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 5.0}

    def render() -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return to_uint8(pipe(PROMPTS[1], generator=generator, output_type="np", **size).frames[0])

    line = runs_of(finished)[LABELS[2], PROMPTS[1]]
    dense = render()
    assert np.array_equal(read_clip(finished / line["reference"]).frames, dense)
    sparsify(pipe, Schedule.from_config(line["config"]))
    sparse = render()
    for name, figures in line["fidelity"].items():
        want = compare(sparse, dense, convention=find_convention(name))
        assert figures["psnr"] == pytest.approx(want.psnr, abs=1e-3)
        assert figures["ssim"] == pytest.approx(want.ssim, abs=1e-5)


def test_summary_and_csv_tell_the_same(finished: Path) -> None:
    record = read_record(finished)
    rows = {row["label"]: row for row in record["summary"]}
    assert list(rows) == LABELS
    own = [line for line in record["runs"] if line["label"] == LABELS[1]]
    assert rows[LABELS[1]]["psnr"] == pytest.approx(np.median([line["psnr"] for line in own]))
    assert rows[LABELS[1]]["psnr_min"] == min(line["psnr"] for line in own)
    assert rows[LABELS[1]]["speedup"] == pytest.approx(np.median([line["speedup"] for line in own]))
    assert rows["dense"]["psnr"] is None
    with (finished / "compare.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["label"] for row in table] == [line["label"] for line in record["runs"]]
    for row, line in zip(table, record["runs"], strict=True):
        assert float(row["psnr"]) == (math.inf if line["psnr"] is None else line["psnr"])
        assert float(row["seconds"]) == line["seconds"]


def test_what_is_there_is_not_done_again(request_of: Request, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    monkeypatch.setattr(Stage, "render", never)
    job = compare_into(request_of, finished)
    assert job.stage is None
    assert run(job) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_more_is_added_against_the_same_dense_video(
    request_of: Request, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: list[tuple[str, int]] = []
    render = Stage.render

    def watched(self: Stage, schedule: Any, prompt: str, seed: int, **options: Any) -> Any:
        rendered.append((schedule.method.name, seed))
        return render(self, schedule, prompt, seed, **options)

    monkeypatch.setattr(Stage, "render", watched)
    before = runs_of(folder)
    chosen = make_cases([SMALL, {"method": "neighborhood", "window": [1, 3, 3]}], None, SCHEDULE)
    assert run(compare_into(request_of, folder, chosen)) == 4
    assert rendered == [("adaspa", 0), ("neighborhood", 0)] * 2
    after = runs_of(folder)
    assert {key: after[key] for key in before} == before
    added = after["neighborhood window=1x3x3", PROMPTS[0]]
    assert added["session"] == 2
    assert added["reference_sha256"] == before["dense", PROMPTS[0]]["reference_sha256"]


def test_a_video_that_is_gone_is_made_again(request_of: Request, folder: Path) -> None:
    line = runs_of(folder)[LABELS[1], PROMPTS[1]]
    pixels = (folder / line["video"]).read_bytes()
    (folder / line["video"]).unlink()
    (folder / "videos" / left_by(999999999, "x.gif")).write_bytes(b"half")
    assert run(compare_into(request_of, folder)) == 1
    assert (folder / line["video"]).read_bytes() == pixels
    assert runs_of(folder)[LABELS[1], PROMPTS[1]]["psnr"] == line["psnr"]
    assert not list((folder / "videos").glob(".*"))


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_damaged_reference_is_rendered_again(request_of: Request, folder: Path, damage: str) -> None:
    before = runs_of(folder)
    line = before[LABELS[1], PROMPTS[0]]
    frame = folder / line["reference"] / "0003.png"
    if damage == "gone":
        frame.unlink()
    else:
        Image.new("RGB", (64, 64)).save(frame)
    (folder / line["video"]).unlink()
    assert run(compare_into(request_of, folder)) == 2
    after = runs_of(folder)
    assert after[LABELS[1], PROMPTS[0]]["psnr"] == line["psnr"]
    assert after[LABELS[2], PROMPTS[0]] == before[LABELS[2], PROMPTS[0]]


def test_runs_against_another_dense_video_are_void(request_of: Request, folder: Path) -> None:
    """As where the dense video cannot be had again bit for bit."""
    content = json.loads((folder / "compare.json").read_text())
    for line in content["runs"]:
        if line["prompt"] == PROMPTS[0]:
            line["reference_sha256"], line["psnr"] = "another video's", 1.0
    (folder / content["runs"][1]["video"]).unlink()
    (folder / "compare.json").write_text(json.dumps(content))
    assert run(compare_into(request_of, folder)) == len(LABELS)
    assert {line["psnr"] for line in runs_of(folder).values()}.isdisjoint({1.0})


class _Failures(Listener):
    def __init__(self) -> None:
        self.labels: list[str] = []

    def failed(self, clip: Any, case: Any, error: Exception) -> None:
        self.labels.append(case.label)


def test_a_case_that_fails_does_not_stop_the_others(
    request_of: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render, failures = Stage.render, _Failures()

    def failing(self: Stage, schedule: Any, prompt: str, seed: int, **options: Any) -> Any:
        if schedule is not None and schedule.method.density == 0.6:
            raise RuntimeError("no such luck")
        return render(self, schedule, prompt, seed, **options)

    monkeypatch.setattr(Stage, "render", failing)
    chosen = make_cases([SMALL], [0.6, 0.3], SCHEDULE)
    out = tmp_path / "out"
    assert run(compare_into(request_of, out, chosen), failures) == 4
    assert failures.labels == [LABELS[1]]
    (failure,) = read_record(out)["failed"]
    assert failure == {
        "label": LABELS[1],
        "prompt": PROMPTS[0],
        "seed": 0,
        "error": "RuntimeError: no such luck",
    }
    monkeypatch.setattr(Stage, "render", render)
    assert run(compare_into(request_of, out, chosen)) == 2
    assert read_record(out)["failed"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "was made with steps 4, got 5: give another --out"),
        ({"format": "png"}, "was made with format 'gif', got 'png'"),
        ({"prompts": ("a", "b", "a")}, "two prompts alike: 'a'"),
        ({"height": 8}, "at least 11 for SSIM"),
    ],
)
def test_what_does_not_fit_the_folder_is_refused(
    request_of: Request, finished: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare_into(request_of, finished, **changes)


def test_another_commit_or_label_is_refused(request_of: Request, folder: Path) -> None:
    relabelled = [replace(make_cases([SMALL], [0.5])[0], label=LABELS[1])]
    with pytest.raises(ValueError, match="stands for other settings there"):
        compare_into(request_of, folder, relabelled)
    content = json.loads((folder / "compare.json").read_text())
    content["environment"]["commit"] = "abc"
    (folder / "compare.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="was made with commit 'abc'"):
        compare_into(request_of, folder)


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"runs": []}'])
def test_a_file_that_is_no_comparison_is_refused(request_of: Request, tmp_path: Path, text: str) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ValueError, match=r"compare\.json .* comparison"):
        compare_into(request_of, tmp_path)


def test_names_that_lead_out_of_the_folder_are_refused(folder: Path) -> None:
    content = json.loads((folder / "compare.json").read_text())
    for name in ("/etc/passwd", "../x", None):
        content["runs"][0]["reference"] = name
        (folder / "compare.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="none of ours"):
            read_record(folder)


def test_a_method_that_does_not_fit_is_refused_by_its_label(request_of: Request, tmp_path: Path) -> None:
    chosen = make_cases([{"method": "neighborhood", "window": [99, 9, 9], "label": "mine"}], None)
    with pytest.raises(ValueError, match=r"mine: .*window"):
        compare_into(request_of, tmp_path / "out", chosen)
    assert not list(tmp_path.iterdir())
