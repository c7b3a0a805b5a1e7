"""`scripts/bench_fidelity.py` on a small size: what is in its report, and that it goes on where it was killed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import bench_fidelity
import numpy as np
import pytest
import torch
from bench_fidelity import main

from dit_sparse import AdaSpa, Neighborhood, Paro, XAttention, load_pipeline, sparsify
from dit_sparse.compare.render import Stage
from dit_sparse.demo import demo_model_path
from dit_sparse.eval import compare
from dit_sparse.methods import METHODS
from tests.processes import FORKSERVER

SMALL = ["--quick", "--size", "5x32x48", "--device", "cpu", "--methods", "neighborhood,adaspa,paro"]
PROMPT = "A large red cross moving left in front of a navy background."
FLOORS = ["another seed", "dense, torch's math kernel", "dense, ours", "random blocks 0.25"]


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))


def rows(path: Path) -> dict[str, dict[str, Any]]:
    report = read(path)
    found = {row["label"]: row for row in report["videos"]}
    assert len(found) == len(report["videos"])
    return found


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick") / "fidelity.json"
    main([*SMALL, "--out", str(out)])
    return out


def test_every_case_is_there_with_what_it_did(quick: Path) -> None:
    found = rows(quick)
    methods = ["neighborhood 0.25", "neighborhood 0.5 (default)", "adaspa 0.25 (default)"]
    methods += ["paro 0.25", "paro 0.5 (default)"]
    assert list(found) == ["dense", *methods, "paro, plan file 0.25", *FLOORS]
    assert found["dense"]["identical"]
    for label in (*methods, "paro, plan file 0.25", "random blocks 0.25"):
        row = found[label]
        assert 0.25 < row["sparse_density"] < row["density"] < 1
        assert row["dense_calls"] == {"warm-up": 16}  # one step of eight layers and two guidance branches
        assert 10 < row["psnr"] < 99
    assert found["paro 0.5 (default)"]["sparse_density"] > found["paro 0.25"]["sparse_density"]
    assert found["random blocks 0.25"]["psnr"] < found["adaspa 0.25 (default)"]["psnr"] - 5
    assert found["dense, torch's math kernel"]["psnr"] is None or found["dense, torch's math kernel"]["psnr"] > 60
    assert found["dense, ours"]["dense_calls"] == {"every block kept": 64}
    searches = read(quick)["searches"]
    assert [search["head_adaptive"] for search in searches] == [True, False]
    for search in searches:
        assert search["steps"] == [1, 2]
        assert np.array(search["recall_full"]).shape == (2, 8, 3)
    assert read(quick)["failed"] == {}


def test_figures_are_those_of_the_pipeline(quick: Path) -> None:
    pipe = load_pipeline(demo_model_path())
    pipe.set_progress_bar_config(disable=True)

    def render() -> np.ndarray:
        size = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 3.5}
        return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **size, output_type="np").frames[0]

    dense = render()
    sparsify(pipe, AdaSpa(density=0.25))
    fidelity, row = compare(render(), dense), rows(quick)["adaspa 0.25 (default)"]
    assert row["psnr"] == pytest.approx(fidelity.psnr, abs=1e-3)
    assert row["ssim"] == pytest.approx(fidelity.ssim, abs=1e-5)


def test_what_is_there_is_not_done_again(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = quick.read_bytes()

    def never(*_: Any) -> None:
        raise AssertionError("a video was rendered again")

    monkeypatch.setattr(Stage, "call", never)
    monkeypatch.setattr(Stage, "render", never)
    main([*SMALL, "--out", str(quick)])
    assert quick.read_bytes() == before


def test_other_settings_prompts_and_searches_alone(tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    also = '{"method": "neighborhood", "window": [2, 8, 6], "warmup": 0.5}'
    main([*SMALL, "--methods", "", "--no-floors", "--prompts", "2-2", "--also", also, "--out", str(out)])
    found = rows(out)
    assert list(found) == ["dense", also]
    assert found[also]["config"]["window"] == [2, 8, 6]
    assert found[also]["dense_calls"] == {"warm-up": 32}
    assert "green ball" in found[also]["prompt"]
    assert read(out)["searches"] == []
    main([*SMALL, "--methods", "", "--no-floors", "--searches", "--out", str(out)])
    assert list(rows(out)) == ["dense", also]
    assert len(read(out)["searches"]) == 2


def test_another_dense_video_makes_its_rows_void(quick: Path, tmp_path: Path) -> None:
    report, out = read(quick), tmp_path / "fidelity.json"
    for row in report["videos"]:
        row["reference"], row["psnr"] = "another video's", 1.0
    report["videos"].pop()
    out.write_text(json.dumps(report), "utf-8")
    main([*SMALL, "--methods", "adaspa", "--out", str(out)])
    found = rows(out)
    assert list(found) == ["dense", "adaspa 0.25 (default)", *FLOORS]
    assert {row["reference"] for row in found.values()} == {rows(quick)["dense"]["reference"]}


def test_a_failure_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such luck")

    out = tmp_path / "fidelity.json"
    arguments = [*SMALL, "--methods", "neighborhood,adaspa", "--no-floors", "--searches", "--out", str(out)]
    with monkeypatch.context() as patched:
        patched.setattr(AdaSpa, "plan", fails)
        with pytest.raises(SystemExit, match="1"):
            main(arguments)
    assert read(out)["failed"] == dict.fromkeys(["adaspa 0.25 (default)", "searches"], "RuntimeError: no such luck")
    assert list(rows(out)) == ["dense", "neighborhood 0.25", "neighborhood 0.5 (default)"]
    assert "failed: searches: RuntimeError: no such luck" in capsys.readouterr().out
    main(arguments)
    assert "adaspa 0.25 (default)" in rows(out)
    assert read(out)["failed"] == {}


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    arguments = [*SMALL, "--methods", "adaspa", "--out", str(out)]
    process = FORKSERVER.Process(target=main, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 120
    while not (out.exists() and len(read(out)["videos"]) >= 3):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    before = rows(out)
    assert len(before) < 2 + len(FLOORS)
    main(arguments)
    after = rows(out)
    assert list(after) == ["dense", "adaspa 0.25 (default)", *FLOORS]
    assert {label: after[label] for label in before} == before
    assert len(read(out)["searches"]) == 2


def test_table_prints_an_earlier_run(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table", "--out", str(quick)])
    printed = capsys.readouterr().out
    row = rows(quick)["adaspa 0.25 (default)"]
    (line,) = [line for line in printed.splitlines() if "adaspa 0.25 (default)" in line]
    for figure in (f"{row['sparse_density']:.3f}", f"{row['psnr']:.2f}", f"{row['ssim']:.4f}"):
        assert figure in line
    assert "finds again" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "adaspe"], "did you mean 'adaspa'"),
        (["--densities", "0.5,0"], "density must be above 0"),
        (["--densities", "half"], "could not convert string to float: 'half'"),
        (["--size", "29x96"], "--size must be frames, height and width"),
        (["--prompts", "0"], "--prompts must be a number or a range such as 3-4, from 1 to 8, got '0'"),
        (["--prompts", "9"], "from 1 to 8, got '9'"),
        (["--prompts", "4-3"], "from 1 to 8, got '4-3'"),
        (["--prompts", "all"], "from 1 to 8, got 'all'"),
        (["--also", "{"], "Expecting property name"),
        (["--also", '{"method": "adaspa", "densty": 1}'], "did you mean 'density'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*SMALL, *arguments, "--out", str(tmp_path / "fidelity.json")])
    assert message in capsys.readouterr().err


def test_a_report_of_other_settings_is_refused(quick: Path) -> None:
    for change in (["--steps", "5"], ["--commit", "abc"]):
        with pytest.raises(SystemExit, match=f"was made with {change[0][2:]} .* give another --out"):
            main([*SMALL, *change, "--out", str(quick)])


def test_defaults_are_marked_and_rendered_once() -> None:
    cases = bench_fidelity.method_cases([Neighborhood(), AdaSpa(), Paro()], (0.25,))
    schedules = [case.schedule.method for case in cases if case.schedule is not None]
    assert AdaSpa() == AdaSpa(density=0.25)
    assert schedules == [Neighborhood(density=0.25), Neighborhood(), AdaSpa(), Paro(density=0.25), Paro()]
    assert [case.label.endswith("(default)") for case in cases] == [False, True, True, False, True]


def test_a_method_with_a_threshold_is_rendered_at_densities_too() -> None:
    cases = bench_fidelity.method_cases([XAttention()], (0.25,))
    assert [case.label for case in cases] == ["xattention 0.25", "xattention (default)"]
    assert bench_fidelity.method_cases([method() for method in METHODS.values()], (0.5, 0.25))


@pytest.mark.parametrize("text", [None, "no JSON", "[]", '{"videos": []}'])
def test_a_file_that_is_no_report_is_refused(text: str | None, tmp_path: Path) -> None:
    out = tmp_path / "other.json"
    if text is not None:
        out.write_text(text, "utf-8")
    with pytest.raises(SystemExit, match="--out must be a report of this script"):
        main(["--table", "--out", str(out)])


def test_parts_with_prompts_of_their_own_are_merged(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    part, out = tmp_path / "part.json", tmp_path / "all.json"
    report = read(quick)
    part.write_text(json.dumps(report | {"videos": [row | {"prompt": "another"} for row in report["videos"]]}), "utf-8")
    main(["--merge", str(quick), str(part), "--out", str(out)])
    assert read(out)["videos"] == report["videos"] + read(part)["videos"]
    assert read(out)["searches"] == report["searches"] * 2
    assert "min to max" in capsys.readouterr().out

    with pytest.raises(SystemExit, match="two parts have the prompt"):
        main(["--merge", str(quick), str(quick), "--out", str(out)])
    part.write_text(json.dumps(report | {"settings": {}}), "utf-8")
    with pytest.raises(SystemExit, match=r"the settings of .* is not that"):
        main(["--merge", str(quick), str(part), "--out", str(out)])
