"""What is checked of a file before a command writes it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dit_sparse.output_file import check_file


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("plan").write_text("kept")
    Path("link").symlink_to("plan")
    os.link("plan", "hard")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "--out must be a file such as a.png, got the folder 'folder'"),
        (".", "got the folder '.'"),
        ("/dev/null", "a device or pipe"),
        ("a.jpg", "with the ending .png, got 'a.jpg'"),
        ("a", "with the ending .png, got 'a'"),
        ("no/a.png", "must be in a folder that exists, got 'no/a.png'"),
        ("/proc/a.png", "'/proc/a.png' cannot be written: "),
    ],
)
def test_refuses(path, message) -> None:
    with pytest.raises(ValueError, match="--out ") as refused:
        check_file("--out", Path(path), example="a.png", ending=".png")
    assert message in str(refused.value)


@pytest.mark.parametrize("path", ["plan", "link", "hard", "folder/../plan"])
def test_refuses_what_is_to_be_kept(path) -> None:
    with pytest.raises(ValueError, match=f"--out must not be the plan file, got '{path}' for both"):
        check_file("--out", Path(path), kept={"the prompts": None, "the plan file": Path("plan")})


def test_refuses_one_new_file_for_two_purposes() -> None:
    with pytest.raises(ValueError, match="--out must not be --report"):
        check_file("--out", Path("new"), kept={"--report": Path("folder/../new")})


def test_allows_and_leaves_no_trace() -> None:
    before = sorted(Path().rglob("*"))
    check_file("--out", Path("a.PNG"), ending=".png", kept={"the plan file": Path("plan")})
    check_file("--out", Path("plan"))
    check_file("--out", Path("no/a.png"), makes_folder=True)
    assert sorted(Path().rglob("*")) == before
