"""What a report is made from, and what cannot be one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from dit_sparse.bench.sections import Row
from dit_sparse.generate.manifest import MANIFEST
from dit_sparse.report import load, write_page
from tests.cli.command import exit_code
from tests.report.conftest import PROMPT, counting_video, manifest_line

ROW = asdict(Row("kernels", "wan-1.3b", 64, "hopper", 0.25, 1.5, 1.12, 300.0, 1e-3, "none"))
BENCH = {
    "environment": {"device": "NVIDIA H200", "torch": "2.13", "commit": None},
    "rounds": 9,
    "rows": [ROW, ROW | {"kernel": "triton", "ideal_ratio": 1.4}],
    "failed": {},
    "skipped": {"flex": "no compiler"},
    "seconds": {"kernels": 1.0},
}


def _compare_json(folder: Path) -> dict:
    """As `compare` writes it, with one prompt and two methods."""
    line = manifest_line(folder)
    names = ("model", "height", "width", "frames", "steps", "guidance", "negative_prompt", "dtype", "device", "offload")
    settings = {name: line[name] for name in (*names, "format", "fps")}
    common = {"prompt": PROMPT, "seed": 0, "reference": "reference/a", "identical": False, "ssim": 0.9}
    dense = {"label": "dense", "kind": "dense", "config": None, "video": line["dense_file"], "trace": None}
    dense |= {"seconds": 4.0, "speedup": 1.0, "achieved_density": 1.0, "psnr": None, "identical": True}
    sparse = {"label": "adaspa 0.3", "kind": "method", "config": line["config"], "video": line["file"]}
    sparse |= {"trace": line["trace"], "seconds": 2.0, "speedup": 2.0, "achieved_density": 0.5, "psnr": 25.0}
    summary = {"kind": "method", "method": "adaspa", "density": 0.3, "runs": 1, "psnr_min": 25.0, "psnr_max": 25.0}
    return {
        "version": 1,
        "settings": settings,
        "environment": {"device": "cpu"},
        "conventions": {"ours": "PSNR"},
        "runs": [common | sparse, common | dense],
        "failed": [{"label": "svg 0.3", "prompt": PROMPT, "seed": 0, "error": "no"}],
        "summary": [
            summary | {key: sparse[key] for key in ("label", "seconds", "speedup", "achieved_density", "psnr")}
        ],
    }


def test_a_folder_of_generate(folder) -> None:
    report = load(folder)
    line = manifest_line(folder)
    assert report.kind == "generate"
    (group,) = report.groups
    assert group.title == PROMPT
    assert [run.label for run in group.runs] == ["dense", "adaspa 0.3"]
    assert [run.file.name for run in group.runs] == [line["dense_file"], line["file"]]
    assert [run.trace and run.trace.name for run in group.runs] == [None, line["trace"]]
    assert ("PSNR", f"{line['psnr']:.2f} dB") in group.runs[1].facts
    assert dict(report.headline)["speed-up"] == f"{line['speedup']:.2f}x"
    (table,) = report.tables
    assert dict(zip(table.columns, table.rows[0], strict=True))["PSNR dB"] == line["psnr"]
    assert report.notes == []
    assert load(folder / MANIFEST) == report


def test_videos_of_one_prompt_and_seed_stand_together(folder, edit) -> None:
    line = manifest_line(folder)
    others = [
        line | {"key": "b", "file": "b.mp4", "config": {"method": "svg", "density": 0.5}},
        line | {"key": "c", "file": "c.mp4", "seed": 1},
        line | {"key": "d", "file": "d.mp4", "config": {"method": "svg", "density": 0.5, "warmup": 0}},
    ]
    with (folder / MANIFEST).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(other) + "\n" for other in others)
    for name in ("b.mp4", "c.mp4", "d.mp4"):
        shutil.copy(folder / line["file"], folder / name)
    groups = load(folder).groups
    assert [[run.label for run in group.runs] for group in groups] == [
        ["dense", "adaspa 0.3", "svg 0.5 (1)", "svg 0.5 (2)"],
        ["dense", "adaspa 0.3"],
    ]


def test_a_folder_of_compare(folder) -> None:
    (folder / "compare.json").write_text(json.dumps(_compare_json(folder)))
    report = load(folder)
    assert report.kind == "compare"
    (group,) = report.groups
    assert [run.label for run in group.runs] == ["dense", "adaspa 0.3"]
    assert "--method adaspa" in group.runs[1].command
    assert report.points == [{"label": "adaspa 0.3", "group": "adaspa", "x": 2.0, "y": 25.0}]
    assert [table.title for table in report.tables] == ["Methods", "Every run"]
    assert report.notes == ["failed: svg 0.3, seed 0: no"]
    assert load(folder / "compare.json") == report
    assert write_page(report, folder / "page.html") > 0


def test_a_benchmark(tmp_path) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(BENCH))
    report = load(path)
    assert report.kind == "bench"
    assert dict(report.headline)["nearest to ideal"] == "1.12 (hopper)"
    (table,) = report.tables
    assert [row[2] for row in table.rows] == ["hopper", "triton"]
    assert report.notes == ["skipped flex: no compiler"]
    assert write_page(report, tmp_path / "page.html") > 0


def _refused(path: Path, capsys, *options: object) -> str:
    """The one line that the command line says of `path`."""
    assert exit_code("report", path, *options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert not list(Path(path if Path(path).is_dir() else Path(path).parent).glob("*.html"))
    return line


def test_a_folder_of_something_else(tmp_path, capsys) -> None:
    assert "neither a manifest.jsonl" in _refused(tmp_path, capsys)
    assert "no such folder" in _refused(tmp_path / "nowhere", capsys)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2] + "\n" + text, "line 1 is no manifest line"),
        (lambda text: "", "its manifest.jsonl is empty"),
        (lambda text: text[: len(text) // 2], "its manifest.jsonl is empty"),
        (lambda text: json.dumps({"key": "a", "file": "b.mp4"}) + "\n", "has no 'prompt': another version"),
    ],
    ids=["half a line", "empty", "only half a line", "foreign"],
)
def test_a_spoilt_manifest(folder, capsys, spoil, message) -> None:
    path = folder / MANIFEST
    path.write_text(spoil(path.read_text("utf-8")), "utf-8")
    assert message in _refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 5}, "must have an object as 'config', got 5"),
        ({"config": None}, "must have an object as 'config', got None"),
        ({"config": {}}, "has no 'method'"),
        ({"config": {"method": "adaspa", "density": "x"}}, "must have a number as 'density', got 'x'"),
        ({"seconds": "x"}, "must have a number as 'seconds', got 'x'"),
        ({"psnr": [1]}, "must have a number as 'psnr', got [1]"),
        ({"prompt": ["a"]}, "must have a text as 'prompt', got ['a']"),
        ({"versions": [1]}, "must have an object as 'versions', got [1]"),
        ({"dense_calls": {"warm-up": "x"}}, "must have a number as 'warm-up', got 'x'"),
        ({"attention_density": ...}, "has no 'attention_density'"),
        ({"convention": ...}, "has no 'convention'"),
    ],
)
def test_a_manifest_edited_by_hand(folder, edit, capsys, changes, message) -> None:
    edit(**changes)
    line = _refused(folder, capsys)
    assert f"{MANIFEST}, video 1, {message}" in line


def test_a_last_line_cut_short_is_an_unfinished_video(folder) -> None:
    path = folder / MANIFEST
    text = path.read_text("utf-8")
    path.write_text(text + text[:100], "utf-8")
    assert len(load(folder).groups) == 1


def test_missing_files(folder, capsys) -> None:
    line = manifest_line(folder)
    (folder / line["dense_file"]).unlink()
    (folder / line["trace"]).unlink()
    assert exit_code("report", folder) == 0
    notes = capsys.readouterr().err.splitlines()
    assert [note for note in notes if line["dense_file"] in note and "is missing" in note]
    assert [note for note in notes if line["trace"] in note and "is missing" in note]
    assert all(run.file is None or run.file.exists() for group in load(folder).groups for run in group.runs)
    (folder / "report.html").unlink()
    (folder / line["file"]).unlink()
    assert "no finished video" in _refused(folder, capsys)


def test_videos_of_different_sizes(folder, capsys) -> None:
    counting_video(folder / manifest_line(folder)["dense_file"], frames=9, size=32)
    line = _refused(folder, capsys)
    assert "32x32, 9 frames" in line
    assert "64x64, 9 frames" in line
    counting_video(folder / manifest_line(folder)["dense_file"], frames=10)
    assert "64x64, 10 frames" in _refused(folder, capsys)


def test_a_video_that_cannot_be_read(folder, capsys) -> None:
    (folder / manifest_line(folder)["file"]).write_bytes(b"no video")
    assert "cannot be read as a video" in _refused(folder, capsys)


def test_files_outside_the_folder(folder, edit, capsys) -> None:
    for key in ("dense_file", "trace"):
        edit(**{key: "../secret"})
        assert "must name files of its own, got '../secret'" in _refused(folder, capsys)
        edit(**{key: manifest_line(folder)["file"]})


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ("{", "is no JSON, or was cut short"),
        ("[]", "must hold a JSON object"),
        ('{"format": 1}', "has no 'steps'"),
        ('{"format": 2, "steps": [], "tracks": [], "masks": []}', "has format 2"),
    ],
)
def test_a_spoilt_trace(folder, capsys, trace, message) -> None:
    (folder / manifest_line(folder)["trace"]).write_text(trace)
    assert message in _refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": ...}, "has no 'rounds'"),
        ({"rows": [{k: v for k, v in ROW.items() if k != "remainder"}]}, "has no 'remainder': another version"),
        ({"rows": []}, "has no row"),
    ],
)
def test_a_benchmark_of_another_version(tmp_path, capsys, changes, message) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({key: value for key, value in (BENCH | changes).items() if value is not ...}))
    assert message in _refused(path, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 7}, "has version 7"),
        ({"summary": ...}, "has no 'summary'"),
        ({"runs": []}, "has no run yet"),
        ({"settings": 5}, "must have an object as 'settings', got 5"),
        ({"summary": {}}, "must have a list as 'summary'"),
    ],
)
def test_a_comparison_of_another_version(folder, capsys, changes, message) -> None:
    found = _compare_json(folder) | changes
    (folder / "compare.json").write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
    assert message in _refused(folder, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": 5}, "must have an object as 'config', got 5"),
        ({"seconds": "x"}, "must have a number as 'seconds', got 'x'"),
        ({"label": ["a"]}, "must have a text as 'label', got ['a']"),
    ],
)
def test_a_comparison_edited_by_hand(folder, capsys, changes, message) -> None:
    found = _compare_json(folder)
    found["runs"][1] |= changes
    (folder / "compare.json").write_text(json.dumps(found))
    assert f"compare.json, run 2, {message}" in _refused(folder, capsys)


def test_too_many_megabytes(folder, capsys) -> None:
    line = _refused(folder, capsys, "--max-size", "0.001")
    assert "--max-size 0.001 MB" in line
    assert "--link" in line
    assert exit_code("report", folder, "--max-size", "0.001", "--link") == 0


def test_a_page_that_cannot_be_written(folder, capsys) -> None:
    line = _refused(folder, capsys, "--out", folder / MANIFEST / "page.html")
    assert "cannot be written" in line
    assert exit_code("report", folder, "--out", "/proc/page.html") == 2
    capsys.readouterr()


@pytest.mark.parametrize("out", [".", "run", "run/videos", "precious"])
def test_a_page_never_replaces_a_folder(folder, tmp_path, monkeypatch, capsys, out) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run/videos", "precious"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kept").write_text("kept")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    line = _refused(folder, capsys, "--out", out)
    assert f"--out must be a file such as FOLDER/report.html, got the folder '{out}'" in line
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before
    with pytest.raises(ValueError, match="got the folder"):
        write_page(load(folder), Path(out))


def test_a_page_never_replaces_another_file(folder, tmp_path, capsys) -> None:
    line = manifest_line(folder)
    (tmp_path / "notes.txt").write_text("kept")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in (folder / MANIFEST, folder / line["file"], folder / line["trace"], tmp_path / "notes.txt"):
        assert "with the ending .html" in _refused(folder, capsys, "--out", name)
    os.mkfifo(tmp_path / "pipe")
    assert "a device or pipe" in _refused(folder, capsys, "--out", tmp_path / "pipe")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    for _ in range(2):  # a page replaces a page
        assert exit_code("report", folder, "--out", tmp_path / "page.html") == 0
