import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse.generate.manifest import MANIFEST, Manifest
from dit_sparse.generate.request import Clip
from tests.generate.test_request import SETTINGS

CLIP = Clip(1, "a red ball", 0)
KEY = SETTINGS.key(CLIP)
LINE = {"key": KEY, "file": "0001-a-red-ball-seed0.mp4", "prompt": "a red ball"}


def test_finished_means_a_line_and_a_file(tmp_path):
    manifest = Manifest(tmp_path)
    assert manifest.finished(KEY) is None
    manifest.append(LINE)
    assert manifest.finished(KEY) is None
    (tmp_path / LINE["file"]).touch()
    assert manifest.finished(KEY) == Manifest(tmp_path).finished(KEY) == LINE


def test_later_lines_win(tmp_path):
    manifest = Manifest(tmp_path)
    (tmp_path / LINE["file"]).touch()
    manifest.append(LINE)
    manifest.append(LINE | {"seconds": 2})
    assert Manifest(tmp_path).finished(KEY)["seconds"] == 2


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_half_last_line_is_forgotten_and_cut_off(tmp_path, cut):
    manifest = Manifest(tmp_path)
    manifest.append(LINE)
    path = tmp_path / MANIFEST
    with path.open("ab") as file:
        file.write(json.dumps(LINE | {"key": "other"}).encode()[:-cut])
    (tmp_path / LINE["file"]).touch()
    resumed = Manifest(tmp_path)
    assert resumed.finished(KEY) == LINE
    assert resumed.finished("other") is None
    resumed.append(LINE | {"key": "next"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == [KEY, "next"]


def test_a_whole_last_line_without_its_newline_counts(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(LINE))
    (tmp_path / LINE["file"]).touch()
    manifest = Manifest(tmp_path)
    assert manifest.finished(KEY) == LINE
    manifest.append(LINE | {"key": "next"})
    assert len((tmp_path / MANIFEST).read_text().splitlines()) == 2


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"key": 1, "file": "a"}', '{"key": "k", "file": "../a"}', ""])
def test_refuses_a_file_of_something_else(tmp_path, line):
    (tmp_path / MANIFEST).write_text(f"{json.dumps(LINE)}\n{line}\n")
    with pytest.raises(ValueError, match="line 2 is no manifest line"):
        Manifest(tmp_path)


def test_names_of_others_are_not_taken(tmp_path):
    manifest = Manifest(tmp_path)
    plain = manifest.file_name(CLIP, SETTINGS)
    assert plain == "0001-a-red-ball-seed0.mp4"
    manifest.append(LINE)
    assert manifest.file_name(CLIP, SETTINGS) == plain
    other = replace(SETTINGS, steps=4)
    hashed = manifest.file_name(CLIP, other)
    assert hashed == f"0001-a-red-ball-seed0-{other.key(CLIP)[:8]}.mp4"
    (tmp_path / hashed).touch()
    assert manifest.file_name(CLIP, other) == f"0001-a-red-ball-seed0-{other.key(CLIP)}.mp4"


def test_a_foreign_file_is_not_taken(tmp_path):
    (tmp_path / "0001-a-red-ball-seed0.mp4").touch()
    assert Manifest(tmp_path).file_name(CLIP, SETTINGS) != "0001-a-red-ball-seed0.mp4"


def test_writes_valid_json_only(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Manifest(tmp_path).append(LINE | {"psnr": float("inf")})
    assert not list(tmp_path.iterdir())


_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()


# A disk takes its time to say that it has a line.
@settings(deadline=None)
@given(st.dictionaries(st.text(), _VALUES | st.lists(_VALUES)))
def test_round_trip(extra):
    line = extra | LINE
    try:
        json.dumps(line, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return
    with tempfile.TemporaryDirectory() as folder:
        Manifest(Path(folder)).append(line)
        (Path(folder) / LINE["file"]).touch()
        assert Manifest(Path(folder)).finished(KEY) == line
